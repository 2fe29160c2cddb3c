"""Prometheus: the text and OpenMetrics expositions of a snapshot, by the official client library."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

from optwatch.exporters.base import HistogramValue, Point, Snapshot
from optwatch.metrics.catalogue import CATALOGUE
from optwatch.metrics.spec import MetricSpec


def family(spec: MetricSpec, points: Sequence[Point]) -> Metric:
    """One family of the exposition. Labels a point does not have are empty, which Prometheus treats as absent."""
    name, labels = spec.prometheus, spec.labels
    rows = [([point.labels.get(label, "") for label in labels], point.value) for point in points]
    if spec.instrument == "histogram":
        histogram = HistogramMetricFamily(name, spec.brief, labels=labels)
        for values, value in rows:
            if isinstance(value, HistogramValue):
                histogram.add_metric(values, buckets(value), value.sum)
        return histogram
    if spec.instrument == "info":
        info = InfoMetricFamily(name.removesuffix("_info"), spec.brief, labels=labels)
        for values, _ in rows:
            info.add_metric(values, {})
        return info
    kind = CounterMetricFamily if spec.instrument == "counter" else GaugeMetricFamily
    made: Metric = kind(name, spec.brief, labels=labels)
    for values, value in rows:
        if not isinstance(value, HistogramValue):
            made.add_metric(values, value)  # type: ignore[attr-defined]  # both kinds have it, their base has not
    return made


def buckets(value: HistogramValue) -> list[tuple[str, float]]:
    """Classic buckets: each includes the ones below it."""
    bounds = (*value.bounds, math.inf)
    names = [floatToGoString(bound) for bound in bounds]  # type: ignore[no-untyped-call]  # the library has no types here
    return list(zip(names, accumulate(value.counts), strict=True))


class PrometheusExporter(Collector):
    """Renders the newest snapshot, once per format: concurrent scrapers get the same bytes."""

    name = "prometheus"

    def __init__(self) -> None:
        self._snapshot: Snapshot = {}
        self._guard = threading.Lock()
        self._rendered: dict[str, bytes] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def accept(self, snapshot: Snapshot) -> None:
        """Take the newest snapshot and forget the rendering of the last."""
        with self._guard:
            if snapshot is not self._snapshot:
                self._snapshot = snapshot
                self._rendered.clear()

    def describe(self) -> list[Metric]:
        """Nothing: registering must not render."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The families of the snapshot, in the catalogue's order."""
        for name, spec in CATALOGUE.items():
            points = self._snapshot.get(name)
            if points:
                yield family(spec, points)

    def render(self, accept: str = "") -> tuple[str, bytes]:
        """Content type and body in the format that an Accept header asks for; text without one."""
        encoder, content_type = choose_encoder(accept)
        with self._guard:
            if content_type not in self._rendered:
                self._rendered[content_type] = encoder(self._registry)
            return content_type, self._rendered[content_type]

    def close(self) -> None:
        """Nothing to let go of."""
