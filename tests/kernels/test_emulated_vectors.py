"""The agreement of the compiled kernels with the reference, with instruction sets that this processor may lack.

Their instructions are emulated by plain loops (``emulated/``), which the kernels' own sources are compiled with. So
what is written for AVX-512 and for Arm is run wherever the tests are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from optwatch.kernels.cpu.library import ISA_VARIABLE

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "optwatch" / "kernels" / "cpu"
EMULATED = Path(__file__).with_name("emulated")
COMPILER = os.environ.get("CXX") or shutil.which("c++")
#: Those of CMakeLists.txt, but that what is compiled for the test need not be fast.
FLAGS = (
    "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fno-exceptions", "-fno-rtti", "-Wno-psabi", f"-I{ROOT}",
)  # fmt: skip
#: What each instruction set is emulated with; both have a multiplication and an addition that are rounded once.
SETS = {"avx512": ("-mavx2", "-mfma", "-include", "avx512.h"), "neon": ("-mfma", "-include", "neon.h")}
#: Rules and formats do not know each other: every rule is run with the formats that it may have loops of its own for,
#: and every format of state and weights with AdamW, which has the most; on every pattern of values and on sizes beside
#: all blocks. Of state_sums, what asks for no other instruction set.
TESTS = """cpu and (
    every_rule and (fp32- or int8- or sgd--)
    or test_agrees_with and (fp32+fp32 or bf16+bf16 or int8+int8)
    or every_weight_format or largest or norms
) or every_format or best"""
PLUGIN = "tests.kernels.emulated.plugin"
FILES = ("test_agreement.py", "test_state_sums.py")

pytestmark = pytest.mark.waits


@pytest.mark.slow
@pytest.mark.parametrize("isa", SETS)
def test_agreement(isa: str, tmp_path: Path) -> None:
    """Of every rule and format."""
    if COMPILER is None:
        pytest.skip("no C++ compiler: install one, or name it in CXX")
    if not {"avx2", "fma"} <= flags():
        pytest.skip("platform: emulated on processors with AVX2 only")
    command = [sys.executable, "-m", "pytest", *(str(Path(__file__).with_name(name)) for name in FILES)]
    # Asked for by name: who runs the tests may have asked for another one.
    environment = {"LIBRARY": str(build(isa, tmp_path)), ISA_VARIABLE: isa}
    ran = subprocess.run(
        [*command, "-q", "-x", "-k", " ".join(TESTS.split()), "-p", PLUGIN, "-p", "no:cacheprovider"],
        env=os.environ | environment, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=550, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert " passed" in ran.stdout
    assert " skipped" not in ran.stdout


def flags() -> set[str]:
    """What this processor has, as Linux names it."""
    told = Path("/proc/cpuinfo")
    return set(told.read_text().split()) if told.exists() else set()


def build(isa: str, folder: Path) -> Path:
    """The library with this instruction set alone, under the name of the one that needs nothing of a processor."""
    registry(folder / "registry.h")
    names = ("-DOPTWATCH_ISA=baseline", f'-DOPTWATCH_ISA_NAME="{isa}"')
    compiled(SOURCES / "kernel.cpp", folder, *SETS[isa], *names)
    for source in ("plan.cpp", "gradient_sums.cpp"):
        compiled(SOURCES / source, folder, "-include", "plain.h")
    library = folder / "liboptwatch_cpu.so"
    subprocess.run([str(COMPILER), "-shared", "-o", library, *folder.glob("*.o")], check=True, timeout=60)
    return library


def compiled(source: Path, folder: Path, *flags: str) -> None:
    """An object file of this source in this folder."""
    found = (f"-I{EMULATED}", f"-I{folder}")
    command = [
        str(COMPILER),
        *FLAGS,
        *found,
        *flags,
        "-c",
        str(source),
        "-o",
        str(folder / f"{source.stem}.o"),
    ]
    subprocess.run(command, check=True, timeout=300)


def registry(path: Path) -> None:
    """The header that CMakeLists.txt generates: the cpu.h of every codec and rule."""
    lines = []
    for kind in ("codec", "rule"):
        headers = sorted((ROOT / "optwatch" / f"{kind}s").glob("*/cpu.h"))
        folders = " ".join(f"X({header.parent.name})" for header in headers)
        lines += [f'#include "{header.relative_to(ROOT)}"' for header in headers]
        lines.append(f"#define OPTWATCH_{kind.upper()}S(X) {folders}")
    path.write_text("\n".join(lines) + "\n")
