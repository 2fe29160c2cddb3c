"""What Prometheus makes of metrics that are pushed over OTLP, by the rules that OpenTelemetry and Prometheus document.

The same for Prometheus' own OTLP receiver and for the collector's exporters to Prometheus, with suffixes on:

- Names: whatever is no letter, digit or underscore becomes an underscore. The unit is appended as a word, ``total`` to
  a counter, ``ratio`` to a gauge of unit 1, each only if the name lacks it. Annotations, ``{step}``, add nothing.
- Labels: the attributes of a point. ``job`` is the resource's service.name (with service.namespace and a slash before
  it, if that is given), ``instance`` its service.instance.id. Its other attributes are labels of ``target_info``.
- ``otel_scope_name`` and ``otel_scope_version`` on every series: newer exporters of the collector add them, others do
  not; queries have to bear them.
- Histograms with explicit bounds become ``_bucket`` (cumulative, with ``le``), ``_sum`` and ``_count``.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from otlp_receivers import Received

#: Labels of every series that are none of a metric.
TARGET = frozenset({"job", "instance", "otel_scope_name", "otel_scope_version"})
UNITS = {"By": "bytes", "s": "seconds", "W": "watts", "J": "joules", "Cel": "celsius"}
STALE = 300.0  # seconds after which a value that is not pushed any more is gone


class Sample(NamedTuple):
    """One sample of a series."""

    name: str
    labels: dict[str, str]
    value: float


def metric_name(metric: Any) -> str:
    """The name of the family."""
    tokens = [token for token in re.split(r"[^a-zA-Z0-9]+", metric.name) if token]
    unit = UNITS.get(metric.unit)
    if unit and unit not in tokens:
        tokens.append(unit)
    if metric.HasField("sum") and metric.sum.is_monotonic:
        tokens = [token for token in tokens if token != "total"] + ["total"]
    if metric.unit == "1" and metric.HasField("gauge"):
        tokens = [token for token in tokens if token != "ratio"] + ["ratio"]
    return "_".join(tokens)


def samples(request: ExportMetricsServiceRequest) -> Iterator[Sample]:
    """All samples of a request."""
    for resource in request.resource_metrics:
        facts = _attributes(resource.resource.attributes)
        service = (facts.pop("service.namespace", ""), facts.pop("service.name"))
        target = {"job": "/".join(filter(None, service)), "instance": facts.pop("service.instance.id")}
        yield Sample("target_info", {**{_label(name): text for name, text in facts.items()}, **target}, 1.0)
        for scope in resource.scope_metrics:
            facts = {"otel_scope_name": scope.scope.name, "otel_scope_version": scope.scope.version}
            for metric in scope.metrics:
                yield from _points(metric, target | facts)


def _points(metric: Any, target: dict[str, str]) -> Iterator[Sample]:
    name = metric_name(metric)
    for point in getattr(metric, metric.WhichOneof("data")).data_points:
        labels = {_label(key): text for key, text in _attributes(point.attributes).items()} | target
        if metric.HasField("histogram"):
            yield from _histogram(name, labels, point)
        else:
            yield Sample(name, labels, point.as_double)


def _histogram(name: str, labels: dict[str, str], point: Any) -> Iterator[Sample]:
    total = 0
    for bound, count in zip((*point.explicit_bounds, math.inf), point.bucket_counts, strict=True):
        total += count
        yield Sample(f"{name}_bucket", {**labels, "le": f"{bound}".replace("inf", "+Inf")}, total)
    yield Sample(f"{name}_sum", labels, point.sum)
    yield Sample(f"{name}_count", labels, point.count)


def _attributes(found: Any) -> dict[str, str]:
    return {one.key: one.value.string_value for one in found if one.value.string_value}


def _label(key: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_]", "_", key)


@contextmanager
def as_scrape(received: Received) -> Iterator[str]:
    """The address where the newest value of every series that came in is served, as the collector's exporter does.

    To be scraped with ``honor_labels``, so that ``job`` and ``instance`` stay those of the resource.
    """
    newest: dict[tuple[str, frozenset[tuple[str, str]]], tuple[float, Sample]] = {}
    taken = 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal taken
            now = time.monotonic()
            with lock:
                requests = received.requests[taken:]
                taken += len(requests)
                for request in requests:
                    for one in samples(request):
                        newest[one.name, frozenset(one.labels.items())] = (now, one)
                lines = sorted(_line(one) for at, one in newest.values() if now - at < STALE)
            body = "".join(lines).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    lock = threading.Lock()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/metrics"
        server.shutdown()


def _line(one: Sample) -> str:
    escapes = {"\\": r"\\", '"': r"\"", "\n": r"\n"}
    pairs = ",".join(
        f'{name}="{"".join(escapes.get(c, c) for c in text)}"' for name, text in sorted(one.labels.items())
    )
    return f"{one.name}{{{pairs}}} {one.value!r}\n"
