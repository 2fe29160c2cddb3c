"""Sums over ranks, and what ranks compute together, equal one process: DDP, FSDP2 and both at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(script: str, ranks: int, *arguments: str) -> None:
    """Run a script of this folder on so many ranks; it prints "equal"."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
            str(Path(__file__).with_name(script)), *arguments,
        ],
        capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"


@pytest.mark.integration
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one_process(ranks: int, tmp_path: Path) -> None:
    """Weights, rows divided by their replicas, state dtypes, checkpoints, and no word between ranks; see ranks.py."""
    boards = tmp_path / "boards"
    boards.mkdir(mode=0o700)
    run("ranks.py", ranks, str(boards))


@pytest.mark.integration
@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_equal_whole_tensors(ranks: int) -> None:
    """Clipping, skipping, LAMB's norms and random numbers, for every way to cut a tensor; see shards.py."""
    run("shards.py", ranks)
