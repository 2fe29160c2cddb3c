"""Write the dashboard: ``python -m dashboards.build [PATH]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import optimizer

DEFAULT_PATH = Path("dashboards/optimizer.json")


def generate() -> str:
    """Return the text of dashboards/optimizer.json."""
    return (
        json.dumps(optimizer.generate(), cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    )


def main() -> None:
    """Write the dashboard to the path given on the command line, by default where it is committed."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_PATH
    path.write_text(generate(), encoding="utf-8")


if __name__ == "__main__":
    main()
