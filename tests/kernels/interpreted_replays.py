"""A watched run whose steps are captured and replayed, in Triton's interpreter; see ``replay.py``."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import optwatch
from optwatch.hooks import probe, replays
from optwatch.hooks.watch import Watch
from tests.hooks.boards import Published, published
from tests.kernels.interpreted_capture import OFTEN, Pair, gradients

assert os.environ["TRITON_INTERPRET"] == "1"

NEVER = 3600.0
COUNTED = ("steps", "steps_skipped", "nonfinite_elements")


class Watched:
    """A pair, of which each optimizer has a board of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pair = Pair(OFTEN[0])
        self.watches: list[Watch] = []
        for name, optimizer in (("ours", self.pair.ours), ("plain", self.pair.plain)):
            (directory / name).mkdir()
            self.watches.append(optwatch.watch(optimizer, directory=directory / name, agent=False, every=1))

    def board(self, name: str) -> Published:
        return published(self.directory / name)

    def close(self) -> None:
        for watch in self.watches:
            watch.close()

    def check(self) -> None:
        """The newest record of both says the same, and so do the counters."""
        ours, plain = self.board("ours"), self.board("plain")
        for name in COUNTED:
            assert ours.counters[name, "AdamW"] == plain.counters[name, "AdamW"]
        mine, other = ([r for r in board.records if r.tables[0] is not None][-1] for board in (ours, plain))
        assert mine.step == other.step
        np.testing.assert_array_equal(mine.tables[0], other.tables[0])
        for name, gauges in ours.gauges.items():
            if name[0].startswith("gradient"):
                assert gauges == pytest.approx(plain.gauges[name], rel=0, nan_ok=True)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    made = Watched(tmp_path)
    yield made
    made.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_each_replay_is_shown(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows, its number and its decision; so is the ordinary step after it."""
    pair = watched.pair
    pair.step(gradients(0, pair.dtype))
    pair.capture(monkeypatch)
    assert watched.board("ours").counters["steps", "AdamW"] == 1
    for step in range(1, 4):
        pair.replay(gradients(step, pair.dtype, step == 2))
        until(lambda step=step: watched.board("ours").counters["steps", "AdamW"] == step + 1)
        watched.check()
    pair.step(gradients(4, pair.dtype))
    watched.check()


def test_replays_that_nobody_saw_are_counted(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was skipped in them; the end of the run shows the newest."""
    monkeypatch.setattr(probe, "PAUSE", NEVER)
    pair = watched.pair
    pair.step(gradients(0, pair.dtype))
    pair.capture(monkeypatch)
    for step in range(1, 5):
        pair.replay(gradients(step, pair.dtype, step in (2, 3)))
    assert watched.board("ours").counters["steps", "AdamW"] == 1
    watched.close()
    watched.check()
    assert watched.board("ours").counters["steps_skipped", "AdamW"] == 2


def test_rows_under_way_are_left_alone(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a copy that is not done yet leaves them: the count before the rows is another than the one after them."""
    monkeypatch.setattr(probe, "PAUSE", NEVER)
    pair = watched.pair
    pair.step(gradients(0, pair.dtype))
    pair.capture(monkeypatch)
    pair.replay(gradients(1, pair.dtype))
    (landing,) = [one for one in pair.rows.captured or () if isinstance(one, replays._Landing)]
    landing._begun += 1
    assert landing.read() is None
    landing._begun -= 1
    found = landing.read()
    assert found is not None
    assert found[0] == 1
    assert landing.read() is None


def test_a_capture_that_cannot_be_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says so once, and is captured all the same."""
    pair = Pair(OFTEN[0])
    pair.step(gradients(0, pair.dtype))
    with optwatch.watch(pair.ours, directory=tmp_path, agent=False):
        with pytest.warns(RuntimeWarning, match="that a CUDA graph replays are not watched"):
            pair.capture(monkeypatch)
        pair.replay(gradients(1, pair.dtype))
        pair.check()


def test_sampled_blocks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their copies would miss the replays, and say that the state is off."""
    pair = Pair(OFTEN[0])
    with optwatch.watch(pair.ours, directory=tmp_path, agent=False, every=1, shadow=0.5):
        pair.step(gradients(0, pair.dtype))
        assert len(published(tmp_path).reader.schema.tables) == 2
        with pytest.warns(RuntimeWarning, match="errors of stored state of AdamW are no longer taken"):
            pair.capture(monkeypatch)
        pair.replay(gradients(1, pair.dtype))
        until(lambda: published(tmp_path).counters["steps", "AdamW"] == 2)
        assert len(published(tmp_path).reader.schema.tables) == 1


def test_watching_changes_no_bit(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does its end, after which the graph goes on."""
    pair = watched.pair
    pair.step(gradients(0, pair.dtype))
    pair.capture(monkeypatch)
    pair.replay(gradients(1, pair.dtype))
    watched.close()
    gc.collect()
    pair.replay(gradients(2, pair.dtype))
    pair.check()


def test_the_thread_ends(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the watch."""
    pair = watched.pair
    pair.step(gradients(0, pair.dtype))
    pair.capture(monkeypatch)
    followers = [thread for thread in threading.enumerate() if thread.name == "optwatch-replays"]
    assert len(followers) == 1
    watched.close()
    until(lambda: not followers[0].is_alive())
