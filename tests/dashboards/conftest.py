"""The generators live beside the package, in the checkout: make them importable."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])

# At the end: the package under test stays the installed one.
if ROOT not in sys.path:
    sys.path.append(ROOT)
