"""Rows of steps that a CUDA graph holds: each replay copies them to the host, and nothing of Python hears of it.

What the graph does for that, in stream order: it counts the replay on the device, copies the count to pinned memory,
then the rows, then the count once more. Whoever looks reads the later count first and the earlier one last: the rows
are those of one replay if both are the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from optwatch.hooks.transfer import Rows
from optwatch.kernels.capture import capturing
from optwatch.kernels.plan import DECISION
from optwatch.metrics.fields import CHEAP_FIELDS, row_length
from optwatch.optim import StatsLayout, StepStats

#: Seconds between two looks.
PAUSE = 0.05
#: Looks in a row at rows that are just being copied.
TRIES = 3
#: Seconds that the end of a run may wait for replays under way.
PATIENCE = 1.0

_NONFINITE, _SKIPPED = CHEAP_FIELDS.index("nonfinite"), DECISION.index("skipped")


class Replays:
    """The captured steps of one optimizer."""

    def __init__(self) -> None:
        self._spare: _Landing | None = None
        self._landings: list[_Landing] = []

    def prepare(self, stats: StepStats) -> None:
        """Have memory for a capture of steps like this one, since it can be had only outside of one."""
        if self._spare is None or self._spare.layouts != stats.layouts:
            devices = {plan.rows.device for plan in stats.plans}
            self._spare = _Landing(stats.layouts, devices.pop()) if len(devices) == 1 else None
            if self._spare is not None:
                self._spare.rehearse(stats)

    @property
    def prepared(self) -> bool:
        """Whether there is memory for a capture."""
        return self._spare is not None

    def capture(self, stats: StepStats) -> bool:
        """Make the copies of this step's rows a part of the graph; False without memory that was prepared for them."""
        landing, self._spare = self._spare, None
        if landing is None or landing.layouts != stats.layouts or stats.captured is None:
            return False
        landing.capture(stats)
        stats.captured.append(landing)  # the graph writes there for as long as it is replayed
        self._landings.append(landing)
        return True

    def newest(self) -> Iterator[tuple[int, Rows]]:
        """Of each graph that was replayed since the last time: how often, and the rows of the newest replay."""
        for landing in self._landings:
            for _ in range(TRIES):
                if (found := landing.read()) is not None:
                    yield found
                    break

    def settle(self) -> None:
        """Wait briefly for replays under way; only for the end of a run."""
        deadline = time.monotonic() + PATIENCE
        for device in {landing.device for landing in self._landings}:
            if device.type != "cuda" or capturing(device):
                continue
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            while not event.query() and time.monotonic() < deadline:
                time.sleep(0.005)


class _Landing:
    """Where one graph counts its replays, on the device, and where it leaves their rows, on the host."""

    def __init__(self, layouts: tuple[StatsLayout, ...], device: torch.device) -> None:
        self.layouts, self.device = layouts, device
        self._seen, self._known = 0, np.zeros(2)
        self._count = torch.full((), -1, dtype=torch.int64, device=device)  # 0 after the rehearsal
        self._totals = torch.zeros(
            2, dtype=torch.float64, device=device
        )  # non-finite elements, skipped steps
        self._begun, self._ended = self._pinned(torch.int64), self._pinned(torch.int64)
        self._sums, self._decision = (
            self._pinned(torch.float64, 2),
            self._pinned(torch.float64, len(DECISION)),
        )
        self._rows = {
            id(layout): self._pinned(torch.float64, len(layout.indices), row_length(len(layout.slots)))
            for layout in layouts
        }

    def _pinned(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=self.device.type == "cuda")

    @torch.no_grad()
    def rehearse(self, stats: StepStats) -> None:
        """Have loaded what a graph launches, which a capture had better not do."""
        self.capture(stats)
        self._totals.zero_()

    @torch.no_grad()
    def capture(self, stats: StepStats) -> None:
        """Launch what the graph is to do after the step."""
        self._full, self._decides, self._step = stats.full, stats.decision is not None, stats.step
        plans = [plan for plan in stats.plans if id(plan.layout) in self._rows]  # sampled blocks are left out
        self._taken = [plan.layout for plan in plans]
        self._count += 1
        for plan in plans:
            self._totals[0] += plan.rows[:, _NONFINITE].sum()
        if stats.decision is not None:
            self._totals[1] += stats.decision[_SKIPPED]
        self._begun.copy_(self._count, non_blocking=True)
        self._sums.copy_(self._totals, non_blocking=True)
        for plan in plans:
            self._rows[id(plan.layout)].copy_(plan.rows, non_blocking=True)
        if stats.decision is not None:
            self._decision.copy_(stats.decision, non_blocking=True)
        self._ended.copy_(self._count, non_blocking=True)

    def read(self) -> tuple[int, Rows] | None:
        """The replays since the last time and the newest one's rows; None without any, or while they are copied."""
        ended = int(self._ended.numpy())
        if ended == self._seen:
            return None
        plans = [(layout, _copy(self._rows[id(layout)])) for layout in self._taken]
        decision = _copy(self._decision) if self._decides else None
        totals = _copy(self._sums)
        if int(self._begun.numpy()) != ended:
            return None
        replays, self._seen = ended - self._seen, ended
        missed, self._known = totals - self._known, totals
        missed[0] -= sum(rows[:, _NONFINITE].sum() for _, rows in plans)
        missed[1] -= decision[_SKIPPED] if decision is not None else 0
        return replays, Rows(self._step, self._full, plans, decision, [], (missed[0], missed[1]))


def _copy(tensor: torch.Tensor) -> NDArray[np.float64]:
    copied: NDArray[np.float64] = tensor.numpy().copy()
    return copied
