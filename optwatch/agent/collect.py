"""One snapshot of everything the agent knows."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from itertools import chain

from optwatch import __version__
from optwatch.agent.boards import Boards
from optwatch.agent.nvml import PROCESS_MEMORY, NvmlSampler
from optwatch.agent.rank import Rank
from optwatch.exporters.base import HistogramValue, Point, Snapshot, Values


class Collector:
    """Forms snapshots, with at most ``series_cap`` series per rank; ``more`` gives the values of other parts."""

    def __init__(self, boards: Boards, nvml: NvmlSampler, series_cap: int, *more: Values) -> None:
        self._boards, self._nvml, self._cap, self._more = boards, nvml, series_cap, more
        self._started = time.time()
        self._dropped: dict[str, set[object]] = {}  # rank -> series that were ever left out
        self.scrape_seconds: float | None = None  # of the newest scrape, set by whoever renders

    def snapshot(self) -> Snapshot:
        """All points by metric name."""
        found: dict[str, list[Point]] = {}
        for rank in self._boards.ranks.values():
            for name, point in self._capped(rank):
                found.setdefault(name, []).append(point)
        for name, point in (
            *self._nvml.points(),
            *self._own(),
            *chain.from_iterable(more() for more in self._more),
        ):
            found.setdefault(name, []).append(point)
        self._dropped = {key: seen for key, seen in self._dropped.items() if key in self._boards.ranks}
        return found

    def _capped(self, rank: Rank) -> Iterator[tuple[str, Point]]:
        """The rank's points up to the cap; they come the most important ones first."""
        seen = self._dropped.setdefault(rank.key, set())
        left = self._cap - 1  # the counter of what was left out is a series too
        for name, point in chain(rank.points(), self._device_memory(rank)):
            left -= series_count(point)
            if left >= 0:
                yield name, point
            elif len(seen) < 100 * self._cap:
                seen.add((name, tuple(point.labels.values())))
        yield "optwatch.series_dropped", Point(rank.labels, float(len(seen)), rank.since)

    def _device_memory(self, rank: Rank) -> Iterator[tuple[str, Point]]:
        pid = rank.pid
        if pid is not None:
            for gpu, value in self._nvml.memory_of(pid):
                yield PROCESS_MEMORY, Point({**rank.labels, "gpu": gpu}, value)

    def _own(self) -> Iterator[tuple[str, Point]]:
        yield "optwatch.build", Point({"version": __version__, "python": platform.python_version()}, 1.0)
        for reason, boards in self._boards.skipped.items():
            yield "optwatch.boards_skipped", Point({"reason": reason}, float(boards), self._started)
        yield "optwatch.nvml_errors", Point({}, float(self._nvml.errors), self._started)
        if self.scrape_seconds is not None:
            yield "optwatch.scrape_duration", Point({}, self.scrape_seconds)


def series_count(point: Point) -> int:
    """Number of Prometheus series that a point makes."""
    if isinstance(point.value, HistogramValue):
        return len(point.value.counts) + 2
    return 1
