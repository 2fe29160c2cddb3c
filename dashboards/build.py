"""Write one dashboard, which the file's name chooses: ``python -m dashboards.build PATH/optimizer.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import fleet, memory, monitor, optimizer
from dashboards.board import Board

#: Part of the package, so that `optwatch dashboards` finds them.
FOLDER = Path("optwatch/dashboards")

BOARDS = {board.name: board for board in (optimizer.BOARD, memory.BOARD, fleet.BOARD, monitor.BOARD)}


def generate(board: Board) -> str:
    """Return the text of a dashboard's file."""
    return json.dumps(board.generate(), cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the dashboard that the path on the command line names."""
    path = Path(sys.argv[1])
    path.write_text(generate(BOARDS[path.stem]), encoding="utf-8")


if __name__ == "__main__":
    main()
