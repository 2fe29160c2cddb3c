"""The wheels, built from a copy of what is under version control, with and without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.integration]
ROOT = Path(__file__).parents[2]
LIBRARY = "optwatch/kernels/cpu/liboptwatch_cpu.so"

# A step of the wheel's own package: unpacked first on the path, then the installed dependencies. Neither the working
# tree nor its editable installation is in reach (-I: no environment, no working directory; -S: no .pth files).
STEP = """
import sys
sys.path[:0] = sys.argv[1:]
import warnings
import torch, optwatch
assert optwatch.__file__.startswith(sys.argv[1]), optwatch.__file__
weights = torch.nn.Parameter(torch.ones(5000))
optimizer = optwatch.optim.AdamW([weights], lr=0.1, weight_decay=0.0, state="int8")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        weights.grad = torch.ones(5000)
        optimizer.step()
print(round(weights[0].item(), 3), [str(warning.message) for warning in caught])
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the files under version control, and new ones that are not ignored. CMake keeps its findings in it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    copy = tmp_path / "sources"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def build(sources: Path, into: Path, **environment: str) -> tuple[Path, str]:
    """Build a wheel; returns it and what the build said."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(into),
        ".",
    ]
    result = subprocess.run(
        command, cwd=sources, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = into.glob("*.whl")
    return wheel, result.stdout + result.stderr


def step(wheel: Path, directory: Path) -> str:
    """Unpack a wheel and take three steps with it; returns the first weight and the warnings."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    paths = [str(directory), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", STEP, *paths], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_one_wheel_for_every_python(sources: Path, tmp_path: Path) -> None:
    """With a compiler: a py3-none-<platform> wheel whose steps run on the compiled kernels, without a warning."""
    wheel, _ = build(sources, tmp_path / "dist")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert LIBRARY in names
    assert "optwatch/dashboards/optimizer.json" in names
    assert "optwatch/py.typed" in names
    assert not [
        name for name in names if name.split("/")[0] in ("tests", "tools", "benchmarks", "dashboards")
    ]
    assert not [name for name in names if name.endswith((".h", ".cpp", ".txt")) and ".dist-info/" not in name]
    assert step(wheel, tmp_path / "unpacked") == "0.7 []"


@pytest.mark.parametrize("broken", ["no compiler", "a compiler that fails"])
def test_without_a_compiler_the_build_goes_on(sources: Path, tmp_path: Path, broken: str) -> None:
    """A py3-none-any wheel and one clear warning; the same numbers, from the reference backend, which says so once."""
    (sources / LIBRARY).write_bytes(b"left behind by an earlier build")
    compiler = "/nonexistent/c++" if broken == "no compiler" else shutil.which("false")
    wheel, said = build(sources, tmp_path / "dist", CXX=str(compiler))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in zipfile.ZipFile(wheel).namelist()
    assert said.count("WARNING: the CPU kernels could not be built") == 1
    weight, _, warnings = step(wheel, tmp_path / "unpacked").partition(" ")
    assert weight == "0.7"
    assert warnings.count("reference backend") == 1
    assert "install optwatch again with a C++17 compiler" in warnings
