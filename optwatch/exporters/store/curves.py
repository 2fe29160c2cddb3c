"""`curves`: a stored run as the plain lists that a page plots and a table is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TypedDict

from optwatch.exporters.store.runfile import Bucket, Key, RunFile
from optwatch.metrics.catalogue import CATALOGUE

#: Over so much time, or one bucket, a counter's increase is averaged: most of a second's buckets hold no step at all.
RATE_SECONDS = 15.0

# Start of a bucket; mean, lowest and highest value.
_Row = tuple[float, float | None, float | None, float | None]


class Curve(TypedDict):
    """One line of a plot. Lists have one entry a bucket; None where there is no number."""

    metric: str  # name in the catalogue
    labels: dict[str, str]
    time: list[float]  # Unix time at which the bucket begins
    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]
    seconds: float  # length of a bucket
    total: float | None  # what a counter has counted in all
    odd: str  # "NaN", "+Inf" or "-Inf" where the newest value is that, which no number of JSON is; else ""


def curves(run: RunFile, since: float = 0.0, points: int = 600) -> Iterator[Curve]:
    """Curves of every metric of the catalogue that the run has, thinned to about so many points each, one at a time.

    Buckets that ended before the Unix time ``since`` are left out. A counter becomes its increase a second, a
    histogram the mean of what it saw, info metrics are left out. Raises StoreError as `RunFile.buckets` does.
    """
    sums: dict[Key, list[Bucket]] = {}  # of histograms; their counts are the series that follow
    for key, buckets in run.buckets(max(0.0, since - RATE_SECONDS), points):
        metric, _, part = key[0].partition("#")
        spec = CATALOGUE.get(metric) if metric in CATALOGUE else None
        if spec is None or spec.instrument == "info" or not buckets:
            continue
        rows: Iterator[_Row]
        total: float | None = None
        if part == "sum":
            sums[metric, key[1]] = buckets
            continue
        if part == "count":
            rows = _means(sums.pop((metric, key[1]), []), buckets)
        elif spec.instrument == "counter":
            rows, total = _rates(buckets), _finite(buckets[-1].last)
        else:
            rows = ((one.start, _finite(one.mean), _finite(one.low), _finite(one.high)) for one in buckets)
        seconds = buckets[-1].seconds
        columns = [list(column) for column in zip(*(r for r in rows if r[0] + seconds > since), strict=True)]
        if columns:
            time, mean, low, high = columns
            yield {"metric": metric, "labels": dict(key[1]), "time": time, "mean": mean, "low": low, "high": high,
                   "seconds": seconds, "total": total, "odd": _odd(buckets[-1].last)}  # fmt: skip


def _rates(buckets: Iterable[Bucket]) -> Iterator[_Row]:
    """Increase a second, over `RATE_SECONDS`; nothing where the counter began anew."""
    known: list[tuple[float, float]] = []
    first = 0
    for one in buckets:
        if one.last is None:
            continue
        if known and one.last < known[-1][1]:
            known, first = [], 0
        known.append((one.start, one.last))
        while first < len(known) - 2 and known[first][0] < one.start - RATE_SECONDS:
            first += 1
        if first < len(known) - 1:
            time, value = known[first]
            shown = _finite((one.last - value) / (one.start - time))
            yield one.start, shown, shown, shown


def _means(sums: list[Bucket], counts: list[Bucket]) -> Iterator[_Row]:
    """Mean of what a histogram saw from bucket to bucket."""
    seen = {one.start: one.last or 0.0 for one in counts}
    for one, two in pairwise(sums):
        more = seen.get(two.start, math.nan) - seen.get(one.start, math.nan)
        if one.last is None or two.last is None or not more > 0:
            continue
        mean = _finite((two.last - one.last) / more)
        yield two.start, mean, mean, mean


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _odd(value: float | None) -> str:
    """The store keeps NaN as None."""
    if value is None:
        return "NaN"
    return "" if math.isfinite(value) else "+Inf" if value > 0 else "-Inf"
