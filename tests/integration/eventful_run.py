"""A training run that has everything a dashboard shows: ``python eventful_run.py``, until it is killed.

An optimizer that clips and skips, an 8-bit one that is not optwatch's, a shadow, scalars and counts, and every event
again and again. Its second rank is none: a board on which are the figures of torch's allocator on a GPU, made up, since
they are what no machine without one has.
"""

from __future__ import annotations

import itertools
import time

import bitsandbytes
import numpy as np
import torch
from torch import nn

import optwatch
from optwatch.board import BoardWriter, Schema, Series, board_directory
from optwatch.cli.demo.resume import resume_as_fp32
from optwatch.metrics.catalogue import CATALOGUE
from optwatch.optim import AdamW

RUN = "eventful"
PAUSE = 0.1  # seconds between steps
ROUND = 30  # steps after which everything happens again
RATES = (1e-3, 5e-4)
GIB = 1 << 30


class Allocator:
    """The board of a rank on a GPU, as far as its allocator goes."""

    def __init__(self, gpu: str) -> None:
        facts = {"run_id": RUN, "rank": 1, "world_size": 2, "host": "here", "pid": 1, "replicas": 1}
        figures = [spec for spec in CATALOGUE.values() if spec.requires == "cuda"]
        gauges, counters = (
            tuple(
                Series(spec.name, {"gpu": gpu} if "gpu" in spec.labels else {})
                for spec in figures
                if spec.instrument == kind
            )
            for kind in ("gauge", "counter")
        )
        self._writer = BoardWriter.create(board_directory(), Schema(facts, gauges, counters))
        self._shape = (len(gauges), len(counters))

    def publish(self, step: int) -> None:
        """Some memory, and a retry a step."""
        gauges, counters = self._shape
        self._writer.publish(step, time.time(), np.full(gauges, GIB), [], np.full(counters, step), [])


class Run:
    """A small model with two optimizers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        own, other = (list(self.model[i].parameters()) for i in (0, 2))
        self.own = AdamW(own, lr=RATES[0], state="int8", max_grad_norm=0.1, nonfinite="skip")
        self.exact = AdamW(own, lr=RATES[0])  # never steps: checkpoints go through it
        self.other = bitsandbytes.optim.AdamW8bit(other, lr=RATES[0])
        self.happenings = {
            1: self._poison,
            2: self._convert,
            3: lambda watch: watch.event("evaluation"),
            4: lambda watch: watch.event("oom"),  # as a loop says that goes on with a smaller batch
            12: lambda _: resume_as_fp32(self.model, self.own),
        }

    def step(self, number: int, watch: optwatch.Watch) -> None:
        """One step of both, and what happens at it."""
        batch = torch.randn(32, 64)
        loss = (self.model(batch) - batch.flip(1)).square().mean()
        watch.log(loss=loss.detach(), accuracy=torch.rand(()))
        watch.count(tokens=batch.numel(), samples=len(batch))
        loss.backward()
        self.happenings.get(number % ROUND, lambda _: None)(watch)
        self.own.param_groups[0]["lr"] = RATES[number // ROUND % 2]
        for optimizer in (self.own, self.other):
            optimizer.step()
            optimizer.zero_grad()

    def _poison(self, _: optwatch.Watch) -> None:
        self.model[0].weight.grad[0, 0] = torch.nan

    def _convert(self, _: optwatch.Watch) -> None:
        """A checkpoint in int8, and a resume from fp32."""
        self.exact.load_state_dict(self.own.state_dict(), convert=True)
        self.own.load_state_dict(self.exact.state_dict(), convert=True)


def main() -> None:
    """Train."""
    torch.set_num_threads(1)
    run, allocator = Run(), Allocator("GPU-0")
    settings = {"every": 5, "shadow": 1.0, "what_if": "int4", "agent": False}
    with optwatch.watch([run.own, run.other], model=run.model, run_id=RUN, **settings) as watch:
        for number in itertools.count():
            run.step(number, watch)
            allocator.publish(number + 1)
            time.sleep(PAUSE)


if __name__ == "__main__":
    main()
