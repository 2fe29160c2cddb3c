"""Sums over ranks, and what ranks compute together, equal one process: DDP, FSDP2 and both at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.integration
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one_process(ranks: int, tmp_path: Path) -> None:
    """Weights bit by bit, rows divided by their replicas, state dtypes and bytes, sharded checkpoints; see ranks.py."""
    boards = tmp_path / "boards"
    boards.mkdir(mode=0o700)
    script = Path(__file__).with_name("ranks.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), str(script), str(boards)],
        capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"
