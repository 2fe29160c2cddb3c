"""A plugin of pytest's: the kernels are those of another library, which ``LIBRARY`` in the environment names."""

from __future__ import annotations

import os
from pathlib import Path

from optwatch.kernels.cpu import library

library.PATH = Path(os.environ["LIBRARY"])
