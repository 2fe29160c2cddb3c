"""What the history of a long run takes: the file after 100,000 steps, and the time of its report.

    python -m benchmarks store [--steps 100000]

One rank with 300 series of the catalogue, two steps a second, is given to the local store second by second, on a clock
that is set; then `optwatch report` and `optwatch export --csv` run on the file as a user would run them. Results go to
benchmarks/results/store.json and store.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from optwatch.exporters import HistogramValue, Point, Snapshot
from optwatch.exporters.store import LocalStore
from optwatch.metrics.catalogue import CATALOGUE

RESULTS = Path(__file__).parent / "results"
RANK = {"run_id": "long", "rank": "0"}
SERIES, STEPS_A_SECOND = 300, 2
# Figure -> (limit, unit, what it is).
LIMITS = {
    "file_mb": (50.0, "MB", "the file of the run, at its largest, write-ahead log included"),
    "bucket_seconds": (None, "s", "its resolution at the end"),
    "accept_ms": (None, "ms", "CPU time of the agent a second of the run, writing and halving included"),
    "report_seconds": (5.0, "s", "`optwatch report`, from the command to the page"),
    "report_mb": (None, "MB", "size of the page"),
    "csv_seconds": (None, "s", "`optwatch export --csv`"),
}


def snapshots(seconds: int) -> Iterator[Snapshot]:
    """What an agent would hand out each second: noise on all gauges, so that nothing compresses by itself."""
    random = np.random.default_rng(0)
    gauges = [spec.name for spec in CATALOGUE.formed("tensor")]
    labels = [
        {**RANK, "optimizer": "AdamW", "group": f"blocks_{i}"} for i in range(SERIES // len(gauges) + 1)
    ]
    points = [(name, own) for own in labels for name in gauges][: SERIES - 5]
    facts = dict.fromkeys(CATALOGUE["optwatch.run"].labels, "") | RANK
    bounds = CATALOGUE["optwatch.step_duration"].buckets
    counts = np.zeros(len(bounds) + 1)
    for second in range(seconds):
        steps = float(STEPS_A_SECOND * (second + 1))
        counts[12] = steps
        made: dict[str, list[Point]] = {
            "optwatch.run": [Point(facts, 1.0)],
            "optwatch.rank_up": [Point(RANK, 1.0)],
            "optwatch.step": [Point(RANK, steps)],
            "optwatch.steps": [Point({**RANK, "optimizer": "AdamW"}, steps)],
            "optwatch.step_duration": [Point(RANK, HistogramValue(bounds, tuple(counts), 0.5 * steps))],
        }
        for (name, own), value in zip(points, random.random(len(points)).tolist(), strict=True):
            made.setdefault(name, []).append(Point(own, value))
        yield made


class Clock:
    """A Unix time that is set."""

    now = 1.7e9

    def __call__(self) -> float:
        """The time it was set to."""
        return self.now


def fill(directory: Path, steps: int) -> dict[str, float]:
    """The run, and what keeping it cost."""
    clock = Clock()
    store = LocalStore(directory, clock=clock)
    seconds = steps // STEPS_A_SECOND
    largest = cpu = 0.0
    for second, snapshot in enumerate(snapshots(seconds)):
        cpu -= time.process_time()
        clock.now += 1
        store.accept(snapshot)
        cpu += time.process_time()
        if second % 100 == 0:
            largest = max(largest, size(directory))
    level = max(bucket.seconds for _, buckets in store.runs["long"].buckets(clock.now) for bucket in buckets)
    largest = max(largest, size(directory))
    store.close()
    return {"file_mb": largest / 1e6, "bucket_seconds": level, "accept_ms": 1e3 * cpu / seconds}


def size(directory: Path) -> int:
    """Bytes of all files of the store."""
    return sum(path.stat().st_size for path in directory.iterdir())


def timed(directory: Path, *arguments: str) -> float:
    """Seconds that a command takes as a process."""
    started = time.perf_counter()
    environment = {**os.environ, "OPTWATCH_STORE": str(directory)}
    subprocess.run(
        [sys.executable, "-m", "optwatch", *arguments], check=True, env=environment, capture_output=True
    )
    return time.perf_counter() - started


def measure(steps: int) -> dict[str, float]:
    """All figures."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "store"
        figures = fill(directory, steps)
        page = Path(place) / "report.html"
        figures["report_seconds"] = min(timed(directory, "report", "long", "-o", str(page)) for _ in range(3))
        figures["report_mb"] = page.stat().st_size / 1e6
        figures["csv_seconds"] = timed(
            directory, "export", "long", "--csv", "-o", str(Path(place) / "run.csv")
        )
    return figures


def report(figures: dict[str, float], steps: int) -> str:
    """The table of store.md."""
    rows = [
        f"| {what} | {figures[name]:.3g} {unit} | {'' if limit is None else f'{limit:g} {unit}'} |"
        for name, (limit, unit, what) in LIMITS.items()
    ]
    head = (
        f"`python -m benchmarks store`: {steps:,} steps, {SERIES} series, {STEPS_A_SECOND} steps a second,"
        f" {platform.machine()}, Python {platform.python_version()}"
    )
    return "\n".join(
        ["# The local store", "", head, "", "| figure | measured | limit |", "|---|---|---|", *rows, ""]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000, help="steps of the run (default: %(default)s)")
    steps = parser.parse_args().steps
    figures = measure(steps)
    text = report(figures, steps)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "store.json").write_text(
        json.dumps({"steps": steps, "series": SERIES, **figures}, indent=1) + "\n"
    )
    (RESULTS / "store.md").write_text(text)


if __name__ == "__main__":
    main()
