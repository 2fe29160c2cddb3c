"""The stand-in for the NVIDIA driver's library, built from tests/agent/nvml.c."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def build_nvml(folder: Path) -> Path:
    """Build the library in the folder, which is to be put on LD_LIBRARY_PATH; returns the folder."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "a C compiler is needed to build the stand-in for the driver"
    source = Path(__file__).parent / "agent" / "nvml.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", source], check=True)
    return folder
