"""The numerics of the Triton kernels without a GPU: ``interpreted*.py``, in processes that interpret them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optwatch.kernels import backend
from tests.kernels.agreement import few_cases

pytestmark = pytest.mark.waits

ROOT = Path(__file__).parents[2]
FILES = (
    "interpreted.py",
    "interpreted_rules.py",
    "interpreted_gate.py",
    "interpreted_capture.py",
    "interpreted_replays.py",
)


def interpret(file: str, *options: str) -> None:
    """Run the tests of ``file`` and show what they print if they fail."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *options,
        f"tests/kernels/{file}",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("file", FILES)
def test_interpreter(file: str) -> None:
    """Each format and pair of types; each rule; alignment, counts, rows."""
    interpret(file, "-m", "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES[:-1])
def test_interpreter_at_length(file: str) -> None:
    """Every plan, every rule with every format, and large tensors."""
    interpret(file, "-m", "slow")


def test_needs_a_device() -> None:
    """Without the interpreter, tensors on the CPU are not for this backend, and it says why."""
    assert backend("triton").why_not(few_cases()[0].spec(), torch.device("cpu")) == "needs a CUDA device"
