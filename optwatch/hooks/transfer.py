"""Moving rows of statistics from the device to the host without anyone waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from optwatch.optim import StatsLayout, StepStats

#: Steps whose rows may be under way at once. A device that is further behind loses the oldest.
DEPTH = 4
#: Arrays over tensors on the CPU that are kept at once, and the elements of the largest: beside a larger one, making an
#: array costs nothing.
VIEWS, VIEWED = 4, 4096


@dataclass
class Rows:
    """The rows of one step, on the host when every event has happened."""

    step: int
    full: bool
    plans: list[tuple[StatsLayout, NDArray[np.float64]]]
    decision: NDArray[np.float64] | None  # see optwatch.kernels.plan.DECISION
    events: list[torch.cuda.Event]
    #: Non-finite elements and skipped steps of replays before this one whose rows nobody has seen.
    missed: tuple[float, float] = (0.0, 0.0)

    def here(self) -> bool:
        """Whether the rows have arrived."""
        return all(event.query() for event in self.events)


class Transfer:
    """A short queue of rows under way. Rows on the CPU are there at once."""

    def __init__(self) -> None:
        self._under_way: deque[Rows] = deque()
        self._pinned: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self._views: deque[tuple[torch.Tensor, NDArray[np.float64]]] = deque(maxlen=VIEWS)
        self.lost = 0

    def send(self, stats: StepStats) -> None:
        """Start copying; the optimizer will use its buffers again two steps later, in stream order."""
        rows = Rows(stats.step, stats.full, [], None, [])
        for plan in stats.plans:
            rows.plans.append((plan.layout, self._on_host(plan.rows, rows.events)))
        if stats.decision is not None:
            rows.decision = self._on_host(stats.decision, rows.events)
        if len(self._under_way) == DEPTH:
            self._under_way.popleft()
            self.lost += 1
        self._under_way.append(rows)

    def _on_host(self, values: torch.Tensor, events: list[torch.cuda.Event]) -> NDArray[np.float64]:
        """Where ``values`` will be once an event, which is added to ``events``, has happened."""
        for known, view in self._views:
            if known is values:
                return view
        if values.device.type == "cpu":
            return self._view(values)
        host = self._buffer(values)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(values.device))
        events.append(event)
        copied: NDArray[np.float64] = host.numpy()
        return copied

    def _view(self, values: torch.Tensor) -> NDArray[np.float64]:
        """A tensor on the CPU as an array: those of a plan of ours come again in every second step."""
        view: NDArray[np.float64] = values.numpy()
        if view.size <= VIEWED:
            self._views.append((values, view))
        return view

    def arrived(self) -> Iterator[Rows]:
        """The rows that are there, oldest first."""
        while self._under_way and self._under_way[0].here():
            yield self._under_way.popleft()

    def drain(self) -> Iterator[Rows]:
        """Everything under way, waiting for the device; only for the end of a run."""
        for rows in self._under_way:
            for event in rows.events:
                event.synchronize()
        yield from self.arrived()

    def _buffer(self, rows: torch.Tensor) -> torch.Tensor:
        """Pinned memory of the shape of ``rows``, used in turn: allocated in the first steps only."""
        ring = self._pinned.setdefault(tuple(rows.shape), [])
        if len(ring) <= DEPTH + 1:
            ring.append(torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True))
            return ring[-1]
        ring.append(ring.pop(0))
        return ring[-1]
