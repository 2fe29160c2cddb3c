"""Boards for tests: a small schema, values for it, and a program that writes a board from its own process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import optwatch
from optwatch.board import BoardWriter, Histogram, HistogramSeries, Schema, Series, Table, TensorInfo
from optwatch.metrics.catalogue import CATALOGUE

ADAMW = {"optimizer": "AdamW"}
BOUNDS = CATALOGUE["optwatch.step_duration"].buckets


def schema(run_id: str = "run", rank: int = 0, tensors: int = 12) -> Schema:
    """A rank with one optimizer of two slots, its tensors in six groups (as many as there are tensors for)."""
    rows = tuple(TensorInfo(f"h.{i}.weight", f"blocks_{i % 6}", 100 + i) for i in range(tensors))
    state = [{**ADAMW, "slot": s, "dtype": "int8", "device": "cpu"} for s in ("exp_avg", "exp_avg_sq")]
    return Schema(
        run={
            "run_id": run_id,
            "rank": rank,
            "world_size": 1,
            "host": "here",
            "pid": os.getpid(),
            "replicas": 1,
        },
        gauges=(*(Series("optwatch.optimizer.state", labels) for labels in state), Series("optwatch.loss")),
        counters=(Series("optwatch.steps", ADAMW), Series("optwatch.nonfinite_elements", ADAMW)),
        infos=(Series("optwatch.optimizer", {**ADAMW, "rule": "adamw", "codec": "int8", "backend": "cpu"}),),
        histograms=(HistogramSeries("optwatch.step_duration", {}, BOUNDS),),
        tables=(Table("AdamW", ("exp_avg", "exp_avg_sq"), (False, True), rows),),
    )


class Feed:
    """Publishes steps whose every value is known from the step's number."""

    def __init__(self, writer: BoardWriter, every: int = 5) -> None:
        self.writer, self.every, self.step = writer, every, 0
        self.durations = Histogram(BOUNDS)

    def rows(self, step: int) -> np.ndarray:
        """Full rows: all fields of all tensors are the step's number."""
        table = self.writer.schema.tables[0]
        return np.full((len(table.tensors), table.width), float(step))

    def publish(self, count: int = 1) -> bool:
        """Publish so many steps, with full statistics at every fifth, the first included."""
        done = True
        for _ in range(count):
            self.step += 1
            self.durations.observe(0.02)
            rows = self.rows(self.step)
            full = self.step % self.every == 1 or self.every == 1
            done &= self.writer.publish(
                self.step,
                time.time(),
                np.array([1000.0 + self.step, 2000.0, np.nan]),
                [rows if full else rows[:, :3]],
                np.array([float(self.step), 0.0]),
                [(self.durations.counts, self.durations.sum)],
            )
        return done


def environment() -> dict[str, str]:
    """Ours, such that another process finds the very package that is tested."""
    path = [str(Path(optwatch.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def start_writer(
    directory: Path,
    run_id: str = "run",
    rank: int = 0,
    hertz: float = 50.0,
    tensors: int = 12,
    steps: int = 0,
) -> subprocess.Popen[str]:
    """A process that writes a board until killed (or for so many steps), after printing ``ready``."""
    arguments = [str(directory), run_id, str(rank), str(hertz), str(tensors), str(steps)]
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        end(process)
        raise AssertionError("the writer did not start; see its error above")
    return process


def end(process: subprocess.Popen[str]) -> None:
    """Kill a writer and take its pipes down."""
    process.kill()
    process.communicate()


def _main(directory: str, run_id: str, rank: str, hertz: str, tensors: str, steps: str) -> None:
    feed = Feed(BoardWriter.create(directory, schema(run_id, int(rank), int(tensors))))
    feed.publish()
    print("ready", flush=True)
    while not int(steps) or feed.step < int(steps):
        feed.publish()
        if float(hertz):
            time.sleep(1 / float(hertz))
    feed.writer.close()


if __name__ == "__main__":
    _main(*sys.argv[1:])
