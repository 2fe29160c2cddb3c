"""What the test suite promises about skips: in CI none goes unnoticed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import pytest
def test_passes(): pass
{extra}
"""
SKIP = "def test_skips(): pytest.skip({reason!r})"
MODULE = "pytest.skip({reason!r}, allow_module_level=True)"
WORKER = ("-n1",)
GPU = "@pytest.mark.gpu\ndef test_on_a_gpu(): assert not 'run'"


def run(directory: Path, extra: str, ci: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a small suite under this suite's conftest."""
    shutil.copy(Path(__file__).with_name("conftest.py"), directory)
    (directory / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu: needs a GPU\n  waits: idle\n")
    (directory / "test_it.py").write_text(SUITE.format(extra=extra))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(directory)]
    # No GPU is visible, so that the outcome is the same on every machine.
    environment = {**os.environ, "CI": ci, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, cwd=directory, capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize(
    ("extra", "ci", "code", "options"),
    [
        ("", "true", 0, ()),
        (SKIP.format(reason="prometheus is not installed"), "true", 1, ()),
        (SKIP.format(reason="prometheus is not installed"), "true", 1, WORKER),
        (SKIP.format(reason="prometheus is not installed"), "", 0, ()),
        (MODULE.format(reason="prometheus is not installed"), "true", 1, ()),
        (MODULE.format(reason="prometheus is not installed"), "true", 1, WORKER),
        (SKIP.format(reason="platform: this processor has no AVX-512"), "true", 0, ()),
        (GPU, "true", 0, ()),
    ],
)
def test_a_skip_in_ci_is_a_failure(
    tmp_path: Path, extra: str, ci: str, code: int, options: tuple[str, ...]
) -> None:
    """Unless the machine itself cannot have what is missing; GPU tests are deselected without a GPU."""
    result = run(tmp_path, extra, ci, *options)
    assert result.returncode == code, result.stdout
    assert ("prometheus is not installed" in result.stdout.partition("CI counts as failed")[2]) == bool(code)


def test_what_waits_starts_first(tmp_path: Path) -> None:
    """With workers, files that wait come before all others, and those with the most tests before the rest."""
    (tmp_path / "test_a.py").write_text("def test_one(): pass")
    (tmp_path / "test_b.py").write_text("import pytest\n@pytest.mark.waits\ndef test_last(): pass")
    options = (*WORKER, "--dist=loadfile", "--no-loadscope-reorder", "-vv")
    result = run(tmp_path, "def test_second(): pass", "", *options)
    files = re.findall(r"PASSED.* (test_\w+)\.py", result.stdout)
    assert files == ["test_b", "test_it", "test_it", "test_a"], result.stdout
