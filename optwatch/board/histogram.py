"""A running histogram in the form a board stores."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Counts of observations per bucket since the start, and their sum.

    ``counts[i]`` counts values in (bounds[i-1], bounds[i]]; the last one those above every bound. Buckets do not
    include each other: the sums over smaller buckets that Prometheus wants are formed by the exporter.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = array("d", [0.0]) * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value, in the metric's unit."""
        self.counts[bisect_left(self.bounds, value)] += 1.0
        self.sum += value
