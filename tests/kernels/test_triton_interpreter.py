"""The numerics of the Triton kernels without a GPU: ``interpreted.py``, in a process that interprets them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optwatch.kernels import backend
from tests.kernels.agreement import few_cases

ROOT = Path(__file__).parents[2]


def interpret(*options: str) -> None:
    """Run the tests of ``interpreted.py`` and show what they print if they fail."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *options,
        "tests/kernels/interpreted.py",
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


def test_interpreter() -> None:
    """Each format and pair of types; alignment, counts, rows."""
    interpret("-m", "not slow")


@pytest.mark.slow
def test_interpreter_at_length() -> None:
    """Every plan, and large tensors."""
    interpret("-m", "slow")


def test_needs_a_device() -> None:
    """Without the interpreter, tensors on the CPU are not for this backend, and it says why."""
    assert backend("triton").why_not(few_cases()[0].spec(), torch.device("cpu")) == "needs a CUDA device"
