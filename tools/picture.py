"""Draw the live view of a running agent into docs/images/view.svg: ``python tools/picture.py [URL] [SECONDS]``.

The picture in the README is made so, from a real run of ``optwatch demo``: the longer it looks, the longer the curve.
"""

from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path

from rich.console import Console

from optwatch.cli.scrape import default_url, fetch, normalise_url
from optwatch.cli.snapshot import Tracker
from optwatch.cli.view import draw

PATH = Path(__file__).parent.parent / "docs" / "images" / "view.svg"


def main() -> None:
    """Look once a second, then draw."""
    url = normalise_url(sys.argv[1]) if sys.argv[1:] else default_url()
    tracker = Tracker()
    for _ in range(int(sys.argv[2]) if sys.argv[2:] else 30):
        snapshot = tracker.update(fetch(url))
        time.sleep(1)
    console = Console(
        record=True, width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(draw(snapshot, url))
    PATH.parent.mkdir(parents=True, exist_ok=True)
    drawn = console.export_svg(title="optwatch demo")
    # rich names a font on somebody's server; a reader's own monospaced one will do.
    PATH.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
