"""The agreement of the compiled kernels with the reference, with the instruction sets below the processor's best."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from optwatch.kernels.cpu.library import ISA_VARIABLE, Library

TESTS = Path(__file__).with_name("test_agreement.py"), Path(__file__).with_name("test_state_sums.py")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_agreement(isa: str) -> None:
    """Every rule, format and size: half a vector beyond a tensor's end is another case with each width."""
    isas = Library().isas
    if isa not in isas[1:]:
        pytest.skip(f"platform: the instruction sets below this processor's best are {isas[1:]}")
    command = [sys.executable, "-m", "pytest", *map(str, TESTS), "-q", "-x", "-k", "cpu or state_sums"]
    environment = os.environ | {ISA_VARIABLE: isa}
    ran = subprocess.run(
        [*command, "-p", "no:cacheprovider"], env=environment, cwd=Path(__file__).parents[2], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=550, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert " passed" in ran.stdout
    assert " skipped" not in ran.stdout
