"""The stand-in for the NVIDIA driver's library, built from tests/agent/nvml.c, and the orders that it takes."""

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


class Driver:
    """What the devices do: a file that the library reads again at every call. ``environment`` is for the agent."""

    def __init__(self, library: Path, directory: Path) -> None:
        self._control = directory / "driver"
        self.environment = {"LD_LIBRARY_PATH": str(library), "FAKE_NVML": str(self._control)}

    def order(self, *lines: str) -> None:
        """Behave like this from now on; nvml.c lists the orders."""
        new = self._control.with_suffix(".new")
        new.write_text("".join(f"{line}\n" for line in lines))
        new.replace(self._control)
