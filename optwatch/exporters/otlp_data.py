"""OTLP: a snapshot in the OpenTelemetry SDK's own data model.

The SDK's instruments cannot take what the boards hold, histograms that are summed already, so points are made here and
handed to the SDK's exporters. All sums and histograms are cumulative. Metrics bear the catalogue's dotted names and
units, from which Prometheus' OTLP receiver forms the very names of a scrape; for that info metrics end in ``.info``.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from optwatch import __version__
from optwatch.exporters.base import HistogramValue, Point, Snapshot
from optwatch.metrics.catalogue import CATALOGUE
from optwatch.metrics.spec import MetricSpec

CUMULATIVE = AggregationTemporality.CUMULATIVE
_SCOPE = InstrumentationScope("optwatch", __version__)
_NANO = 1_000_000_000

#: Device metrics under OpenTelemetry's conventions for hardware, too: catalogue name -> (name, unit, instrument).
#: An up-down counter is a sum that is not monotonic: over the devices of a host it adds up.
HARDWARE = {
    "optwatch.device.memory.used": ("hw.gpu.memory.usage", "By", "updown"),
    "optwatch.device.memory.total": ("hw.gpu.memory.limit", "By", "updown"),
    "optwatch.device.utilization.ratio": ("hw.gpu.utilization", "1", "gauge"),
    "optwatch.device.power": ("hw.power", "W", "gauge"),
    "optwatch.device.energy": ("hw.energy", "J", "counter"),
    "optwatch.device.temperature": ("hw.temperature", "Cel", "gauge"),
    "optwatch.device.ecc_errors": ("hw.errors", "{error}", "counter"),
    "optwatch.device_up": ("hw.status", "1", "updown"),
}


class Translator:
    """Makes `MetricsData` of snapshots: one resource for each run, and one for the node."""

    def __init__(self) -> None:
        self._given = OTELResourceDetector().detect()  # OTEL_RESOURCE_ATTRIBUTES, OTEL_SERVICE_NAME
        self._resources: dict[str, Resource] = {}

    def data(self, snapshot: Snapshot, time: float) -> MetricsData:
        """All points of the snapshot that was taken at this Unix time."""
        now = int(time * _NANO)
        found: defaultdict[str, list[Metric]] = defaultdict(list)
        for name, spec in CATALOGUE.items():
            by_run: defaultdict[str, list[Point]] = defaultdict(list)
            for point in snapshot.get(name, ()):
                by_run[point.labels.get("run_id", "")].append(point)
            for run, points in by_run.items():
                found[run].append(_metric(spec, points, now))
        found[""] += _hardware(snapshot, now)
        self._resources = {run: self._resources.get(run) or self._resource(run) for run in found}
        return MetricsData(
            [
                ResourceMetrics(self._resources[run], [ScopeMetrics(_SCOPE, metrics, "")], "")
                for run, metrics in found.items()
                if metrics
            ]
        )

    def _resource(self, run: str) -> Resource:
        """What the environment says of the service, and what it does not.

        The instance is the agent, for all its runs: Prometheus makes the label ``instance`` of it, by which a query
        finds the devices of the node that a rank runs on.
        """
        given = self._given.attributes
        host = str(given.get("host.name") or socket.gethostname())
        own = {"service.name": "optwatch", "host.name": host, "service.version": __version__}
        if run:
            own["optwatch.run.id"] = run
        instance = Resource({"service.instance.id": str(given.get("service.instance.id") or host)})
        return Resource.create(own).merge(self._given).merge(instance)


def metric_name(spec: MetricSpec) -> str:
    """The name under which a metric is pushed."""
    return f"{spec.name}.info" if spec.instrument == "info" else spec.name


def _metric(spec: MetricSpec, points: Sequence[Point], now: int) -> Metric:
    data: Gauge | Sum | Histogram
    if spec.instrument == "histogram":
        data = Histogram([_histogram(point, now) for point in points], CUMULATIVE)
    else:
        numbers = [_number(point, now) for point in points]
        data = Sum(numbers, CUMULATIVE, True) if spec.instrument == "counter" else Gauge(numbers)
    return Metric(metric_name(spec), spec.brief, spec.unit, data)


def _attributes(labels: Mapping[str, str]) -> dict[str, str]:
    """Without empty ones, which Prometheus takes for absent."""
    return {name: value for name, value in labels.items() if value}


def _number(point: Point, now: int) -> NumberDataPoint:
    assert not isinstance(point.value, HistogramValue)
    return NumberDataPoint(_attributes(point.labels), int(point.since * _NANO), now, float(point.value))


def _histogram(point: Point, now: int) -> HistogramDataPoint:
    value = point.value
    assert isinstance(value, HistogramValue)
    counts = [int(count) for count in value.counts]
    return HistogramDataPoint(
        _attributes(point.labels), int(point.since * _NANO), now, sum(counts), value.sum, counts, value.bounds,
        None, None,  # type: ignore[arg-type]  # smallest and largest are optional in OTLP, and not known
    )  # fmt: skip


def _hardware(snapshot: Snapshot, now: int) -> Iterator[Metric]:
    """The devices under the semantic conventions."""
    facts = {point.labels["gpu"]: point.labels for point in snapshot.get("optwatch.device", ())}
    for own, (name, unit, instrument) in HARDWARE.items():
        numbers = [
            NumberDataPoint({**_device(point.labels, facts), **more}, int(point.since * _NANO), now, value)
            for point in snapshot.get(own, ())
            for more, value in _hardware_values(name, point)
        ]
        if not numbers:
            continue
        gauge = instrument == "gauge"
        data = Gauge(numbers) if gauge else Sum(numbers, CUMULATIVE, instrument == "counter")
        yield Metric(name, CATALOGUE[own].brief, unit, data)


def _hardware_values(name: str, point: Point) -> Iterator[tuple[dict[str, str], float]]:
    """Further attributes and the value; ``hw.status`` has a series for each state, 1 for the one it is in."""
    assert not isinstance(point.value, HistogramValue)
    if name == "hw.status":
        yield {"hw.state": "ok"}, point.value
        yield {"hw.state": "failed"}, 1.0 - point.value
    elif name == "hw.errors":
        yield {"error.type": point.labels["error"]}, point.value
    else:
        yield {}, point.value


def _device(labels: Mapping[str, str], facts: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    known = facts.get(labels["gpu"], {})
    attributes = {
        "hw.id": labels["gpu"],
        "hw.type": "gpu",
        "hw.vendor": "NVIDIA",
        "hw.model": known.get("model", ""),
        "hw.driver_version": known.get("driver", ""),
    }
    return _attributes(attributes)
