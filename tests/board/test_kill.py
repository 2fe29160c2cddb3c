"""SIGKILL in the middle of writing, in a process of its own."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from board_samples import end, start_writer
from board_samples import schema as sample_schema
from optwatch.board import BoardReader, BoardWriter, State


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.01, 0.02, 0.031, 0.047])
def test_killed_writer_leaves_its_last_values(tmp_path: Path, delay: float) -> None:
    """However the kill falls, the header is readable, its records are right, and the lock is gone."""
    process = start_writer(tmp_path, hertz=0, tensors=200)  # no pauses: almost always inside a write
    reader = BoardReader(tmp_path / "run-0.board")
    assert reader.alive()
    assert reader.holder() == process.pid
    time.sleep(delay)
    end(process)
    assert not reader.alive()
    assert reader.holder() is None
    poll = reader.poll()
    assert poll.live.state is State.RUNNING
    assert poll.live.step >= 1
    assert poll.live.counters[0] == poll.live.step
    assert poll.records[-1].step == poll.live.step
    for record in poll.records:
        np.testing.assert_array_equal(record.tables[0], record.step)
    BoardWriter.create(tmp_path, sample_schema()).close()  # the name is free again


def test_reading_beside_a_writer_in_full_flight(tmp_path: Path) -> None:
    """Thousands of moments to tear: every record read is right, and read and lost add up to what was published."""
    process = start_writer(tmp_path, hertz=0, tensors=50)
    reader = BoardReader(tmp_path / "run-0.board")
    seen = lost = published = 0
    try:
        while published < 30_000:
            poll = reader.poll()
            published = poll.live.published
            seen += len(poll.records)
            lost += poll.lost
            assert seen + lost == published
            for record in poll.records:
                assert (record.tables[0] == record.step).all()
    finally:
        end(process)
    assert seen > 300
