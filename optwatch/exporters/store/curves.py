"""`curves`: a stored run as the plain lists that a page plots and a table is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import TypedDict

from optwatch.exporters.store.runfile import Bucket, Key, RunFile
from optwatch.metrics.catalogue import CATALOGUE


class Curve(TypedDict):
    """One line of a plot. Lists have one entry a bucket; None where there is no number."""

    metric: str  # name in the catalogue
    labels: dict[str, str]
    time: list[float]  # Unix time at which the bucket begins
    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]


def curves(run: RunFile, since: float = 0.0, points: int = 600) -> list[Curve]:
    """Curves of every metric of the catalogue that the run has, thinned to about so many points each.

    Nothing that happened before the Unix time ``since`` is asked for. A counter becomes its increase a second, a
    histogram the mean of what it saw, info metrics are left out.
    """
    stored = dict(run.buckets(since, points))
    found: list[Curve] = []
    for key, buckets in stored.items():
        metric, _, part = key[0].partition("#")
        spec = CATALOGUE.get(metric) if metric in CATALOGUE else None
        if spec is None or spec.instrument == "info" or part == "count":
            continue
        if part == "sum":
            found.append(_means(metric, key, buckets, stored.get((f"{metric}#count", key[1]), [])))
        elif spec.instrument == "counter":
            found.append(_rates(metric, key, buckets))
        else:
            found.append(_plain(metric, key, buckets))
    return [curve for curve in found if curve["time"]]


def _curve(
    metric: str, key: Key, rows: Iterable[tuple[float, float | None, float | None, float | None]]
) -> Curve:
    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
    time, mean, low, high = columns
    return {"metric": metric, "labels": dict(key[1]), "time": time, "mean": mean, "low": low, "high": high}


def _plain(metric: str, key: Key, buckets: list[Bucket]) -> Curve:
    return _curve(
        metric, key, ((one.start, _finite(one.mean), _finite(one.low), _finite(one.high)) for one in buckets)
    )


def _rates(metric: str, key: Key, buckets: list[Bucket]) -> Curve:
    """Increase a second from bucket to bucket; nothing where the counter began anew."""
    rows = []
    for one, two in pairwise(buckets):
        if one.last is None or two.last is None:
            continue
        rate = (two.last - one.last) / (two.start - one.start)
        shown = _finite(rate) if rate >= 0 else None
        rows.append((two.start, shown, shown, shown))
    return _curve(metric, key, rows)


def _means(metric: str, key: Key, sums: list[Bucket], counts: list[Bucket]) -> Curve:
    """Mean of what a histogram saw from bucket to bucket."""
    seen = {one.start: one.last or 0.0 for one in counts}
    rows = []
    for one, two in pairwise(sums):
        more = seen.get(two.start, math.nan) - seen.get(one.start, math.nan)
        if one.last is None or two.last is None or not more > 0:
            continue
        mean = _finite((two.last - one.last) / more)
        rows.append((two.start, mean, mean, mean))
    return _curve(metric, key, rows)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
