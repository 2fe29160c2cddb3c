"""What an agent shows of one rank, on a clock that is set, and what the local store has of it then."""

from __future__ import annotations

from pathlib import Path

from optwatch.exporters import HistogramValue, Point
from optwatch.exporters.store import LocalStore, RunFile
from optwatch.exporters.store.runfile import Bucket

RANK = {"run_id": "run-1", "rank": "0"}
FACTS = {"world_size": "1", "local_rank": "0", "host": "here", "job_id": "7", "pid": "1", "replicas": "1"}
LOSS = ("optwatch.loss", (("rank", "0"),))
GPU = ("optwatch.device_up", (("gpu", "GPU-1"),))


class Clock:
    """A Unix time that is set."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def snapshot(loss: float = 0.5, up: float = 1.0, steps: float = 0.0, **more: float):
    """One rank that has a gauge, a counter, a histogram, and a GPU of the node beside it."""
    counts = (steps, 0.0)
    return {
        "optwatch.run": [Point({**RANK, **FACTS}, 1.0)],
        "optwatch.rank_up": [Point(RANK, up)],
        "optwatch.loss": [Point(RANK, loss)],
        "optwatch.steps": [Point({**RANK, "optimizer": "AdamW"}, steps)],
        "optwatch.step_duration": [Point(RANK, HistogramValue((1.0,), counts, 0.25 * steps))],
        "optwatch.device_up": [Point({"gpu": "GPU-1"}, 1.0)],
        **{name: [Point(RANK, value)] for name, value in more.items()},
    }


def stored(path: Path) -> dict[object, list[Bucket]]:
    file = RunFile(path, read_only=True)
    try:
        return dict(file.buckets())
    finally:
        file.close()


def fill(store: LocalStore, clock: Clock, moments: int) -> None:
    for i in range(moments):
        clock.now += 1
        store.accept(snapshot(loss=float(i), steps=10.0 * i))
