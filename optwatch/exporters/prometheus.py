"""Prometheus: the text and OpenMetrics expositions of a snapshot, by the official client library."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TypeAlias

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from optwatch.exporters.base import HistogramValue, Point, Snapshot
from optwatch.metrics.catalogue import CATALOGUE
from optwatch.metrics.spec import MetricSpec

Encoder: TypeAlias = Callable[[Collector], bytes]

_LATELY_SECONDS = 60.0
_FORMATS = 2  # rendered ahead of being asked for; a client can name any number of them


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


class _Page(Collector):
    """A snapshot and what was rendered of it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._guard = threading.Lock()
        self._bodies: dict[str, bytes] = {}

    def collect(self) -> Iterator[Metric]:
        """The families of the snapshot, in the catalogue's order."""
        for name, spec in CATALOGUE.items():
            points = self.snapshot.get(name)
            if points:
                yield family(spec, points)

    def body(self, content_type: str, encoder: Encoder) -> bytes:
        """What the encoder makes of it; who comes meanwhile waits for the same bytes."""
        with self._guard:
            if content_type not in self._bodies:
                self._bodies[content_type] = encoder(self)
            return self._bodies[content_type]


class PrometheusExporter:
    """Renders a snapshot once per format: concurrent scrapers get the same bytes.

    The formats that were asked for lately are rendered when the snapshot comes, by who brings it; until that is done
    scrapers get the last one's bytes. What nobody reads is not rendered.
    """

    name = "prometheus"

    def __init__(self) -> None:
        self._page = _Page({})
        self._guard = threading.Lock()
        self._asked: dict[str, tuple[Encoder, float]] = {}  # content type -> and when, newest last

    @property
    def wanted(self) -> bool:
        """Whether anybody asked lately."""
        return bool(self._lately())

    def accept(self, snapshot: Snapshot) -> None:
        """Take the newest snapshot, which scrapers get once it is rendered in the formats they ask for.

        One thread at a time may call this.
        """
        if snapshot is self._page.snapshot:
            return
        page = _Page(snapshot)
        for content_type, encoder in self._lately().items():
            page.body(content_type, encoder)
        self._page = page

    def render(self, accept: str = "") -> tuple[str, bytes]:
        """Content type and body in the format that an Accept header asks for; text without one."""
        encoder, content_type = choose_encoder(accept)
        with self._guard:
            self._asked.pop(content_type, None)
            self._asked[content_type] = encoder, time.monotonic()
            while len(self._asked) > _FORMATS:
                del self._asked[next(iter(self._asked))]
        return content_type, self._page.body(content_type, encoder)

    def close(self) -> None:
        """Nothing to let go of."""

    def _lately(self) -> dict[str, Encoder]:
        since = time.monotonic() - _LATELY_SECONDS
        with self._guard:
            return {name: encoder for name, (encoder, asked) in self._asked.items() if asked >= since}
