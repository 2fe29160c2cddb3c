"""OTLP against real receivers: the very samples of the scrape, whatever the collector does."""

from __future__ import annotations

import re
import sys
import time

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from agent_process import eventually
from optwatch.exporters import HistogramValue, Point
from optwatch.exporters.otlp import OtlpError, OtlpExporter, OtlpSettings
from optwatch.exporters.otlp_data import HARDWARE
from optwatch.exporters.prometheus import PrometheusExporter
from optwatch.metrics.catalogue import CATALOGUE
from otlp_conversion import TARGET, samples
from otlp_receivers import RECEIVERS, Received

CUMULATIVE = 2  # of the protocol's AggregationTemporality


def points(name: str) -> list[Point]:
    """Two points with all labels of a metric, of two runs where it knows runs."""
    spec = CATALOGUE[name]
    made = []
    for number in (1, 2):
        labels = {label: f'{label} "{number}"' for label in spec.labels}
        value: float | HistogramValue = number + 0.25
        if spec.instrument == "histogram":
            counts = tuple(float(i * number) for i in range(len(spec.buckets) + 1))
            value = HistogramValue(spec.buckets, counts, 7.5)
        elif spec.instrument == "info":
            value = 1.0
        made.append(Point(labels, value, 1e9 + number))
    return made if spec.labels else made[:1]


SNAPSHOT = {name: points(name) for name in CATALOGUE}


def scraped(text: str) -> dict[tuple, float]:
    """The samples of a scrape, without empty labels, which are none to Prometheus."""
    return {
        (s.name, tuple(sorted((k, v) for k, v in s.labels.items() if v))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def own(request: ExportMetricsServiceRequest) -> dict[tuple, float]:
    """Ours of the samples that Prometheus makes of a request, without the labels of the target."""
    found = {}
    for sample in samples(request):
        if sample.name.startswith("optwatch_"):
            labels = {name: value for name, value in sample.labels.items() if name not in TARGET}
            key = (sample.name, tuple(sorted(labels.items())))
            assert key not in found, f"{key} was pushed twice"
            found[key] = sample.value
    return found


@pytest.fixture(scope="module", params=RECEIVERS)
def delivered(request) -> Received:
    """A receiver that got the whole catalogue once, over each protocol."""
    with RECEIVERS[request.param]() as received:
        exporter = OtlpExporter(OtlpSettings(received.url, request.param))
        exporter.accept(SNAPSHOT)
        received.wait_for()
        exporter.close()
        yield received


def test_the_same_samples_as_a_scrape(delivered: Received) -> None:
    """Names, labels and values of every metric, one by one."""
    prometheus = PrometheusExporter()
    prometheus.accept(SNAPSHOT)
    expected = scraped(prometheus.render()[1].decode())
    assert len(expected) > 2 * len(CATALOGUE) - 10
    assert own(delivered.requests[0]) == expected


def test_resources(delivered: Received) -> None:
    """One for each run and one for the node; run and rank are on the points, too."""
    resources = [
        {a.key: a.value.string_value for a in one.resource.attributes}
        for one in delivered.requests[0].resource_metrics
    ]
    assert [r.get("optwatch.run.id") for r in resources].count(None) == 1
    assert {r.get("optwatch.run.id") for r in resources} == {None, 'run_id "1"', 'run_id "2"'}
    assert {r["service.name"] for r in resources} == {"optwatch"}
    assert len({r["service.instance.id"] for r in resources}) == 1
    assert all(r["host.name"] for r in resources)


def test_sums_are_cumulative_and_say_since_when(delivered: Received) -> None:
    """Temporality, monotonicity and start of every sum and histogram."""
    for resource in delivered.requests[0].resource_metrics:
        for metric in (m for scope in resource.scope_metrics for m in scope.metrics):
            kind = metric.WhichOneof("data")
            if kind == "gauge":
                continue
            data = getattr(metric, kind)
            assert data.aggregation_temporality == CUMULATIVE
            assert {p.start_time_unix_nano for p in data.data_points} <= {
                1000000001 * 10**9,
                1000000002 * 10**9,
            }
            if kind == "sum":
                assert data.is_monotonic == (
                    metric.name in ("hw.energy", "hw.errors") or metric.name in CATALOGUE
                )


def test_devices_under_the_semantic_conventions(delivered: Received) -> None:
    """Every mapped metric, with the attributes that the conventions require, and one state at a time."""
    found = {
        metric.name: getattr(metric, metric.WhichOneof("data")).data_points
        for resource in delivered.requests[0].resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name.startswith("hw.")
    }
    assert set(found) == {name for name, _, _ in HARDWARE.values()}
    for series in found.values():
        for point in series:
            attributes = {a.key: a.value.string_value for a in point.attributes}
            assert attributes["hw.id"].startswith("gpu ")
            assert (attributes["hw.type"], attributes["hw.vendor"]) == ("gpu", "NVIDIA")
            assert attributes["hw.model"].startswith("model ")
    assert {a.value.string_value for p in found["hw.status"] for a in p.attributes if a.key == "hw.state"} == {
        "ok", "failed",
    }  # fmt: skip


@pytest.mark.parametrize("protocol", RECEIVERS)
def test_a_refusing_collector_is_counted_and_tried_on(protocol: str) -> None:
    """HTTP 400 and INVALID_ARGUMENT are failures, not successes; when it takes metrics again they arrive."""
    with RECEIVERS[protocol]() as received:
        received.refuse = True
        exporter = OtlpExporter(OtlpSettings(received.url, protocol))
        exporter.accept({"optwatch.loss": SNAPSHOT["optwatch.loss"]})
        eventually(lambda: _counted(exporter, exports=0, refused=1, overflow=0))
        received.refuse = False
        exporter.accept({"optwatch.loss": SNAPSHOT["optwatch.loss"]})
        received.wait_for()
        eventually(lambda: _counted(exporter, exports=1, refused=1, overflow=0))
        exporter.close()


@pytest.mark.parametrize("protocol", RECEIVERS)
def test_a_collector_that_does_not_answer_holds_up_nothing(protocol: str) -> None:
    """The queue drops the oldest and counts them, handing over never waits, and closing has an end."""
    with RECEIVERS[protocol]() as received:
        received.wait = 60.0
        exporter = OtlpExporter(OtlpSettings(received.url, protocol))
        started = time.monotonic()
        exporter.accept(SNAPSHOT)
        eventually(lambda: _waiting(exporter, 0))  # the first is on its way
        for _ in range(20):
            exporter.accept(SNAPSHOT)
        _counted(exporter, exports=0, refused=0, overflow=12)
        assert time.monotonic() - started < 10, "the collector's 60 s were waited for"
        exporter.close()
        assert time.monotonic() - started < 20, "the collector's 60 s were waited for"


def _counted(exporter: OtlpExporter, **expected: float) -> None:
    found = {p.labels.get("reason", "exports"): p.value for _, p in exporter.points()}
    assert found == expected


def _waiting(exporter: OtlpExporter, count: int) -> None:
    assert len(exporter._queue) == count


def test_headers_and_compression_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK's variables work as everywhere."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=blue")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=lab,host.name=named")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "training")
    with RECEIVERS["http/protobuf"]() as received:
        exporter = OtlpExporter(OtlpSettings(received.url))
        exporter.accept({"optwatch.loss": SNAPSHOT["optwatch.loss"]})
        request = received.wait_for()
        exporter.close()
    assert received.headers[0]["x-tenant"] == "blue"
    assert received.headers[0]["content-encoding"] == "gzip"
    resource = {a.key: a.value.string_value for a in request.resource_metrics[0].resource.attributes}
    assert resource["deployment.environment"] == "lab"
    assert (resource["host.name"], resource["service.name"]) == ("named", "training")


BASE, METRICS = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ({}, {}, None),
        ({}, {BASE: "http://c:4318"}, OtlpSettings("http://c:4318/v1/metrics")),
        ({}, {BASE: "http://c/otel/"}, OtlpSettings("http://c/otel/v1/metrics")),
        ({}, {METRICS: "http://c:1/x"}, OtlpSettings("http://c:1/x")),
        ({}, {BASE: "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, OtlpSettings("http://c:4317", "grpc")),
        ({}, {BASE: "http://c", "OTEL_METRICS_EXPORTER": "none"}, None),
        ({}, {BASE: "http://c", "OTEL_SDK_DISABLED": "true"}, None),
        ({"endpoint": "http://a"}, {METRICS: "http://c"}, OtlpSettings("http://a")),
        ({"endpoint": "http://a", "protocol": "http"}, {}, OtlpSettings("http://a")),
        ({"endpoint": "http://a"}, {"OTEL_METRIC_EXPORT_INTERVAL": "500"}, OtlpSettings("http://a", interval=0.5)),
        ({"endpoint": "http://a", "interval": 3.0}, {"OTEL_METRIC_EXPORT_INTERVAL": "500"},
         OtlpSettings("http://a", interval=3.0)),
    ],
)  # fmt: skip
def test_settings(given: dict, environment: dict[str, str], expected: OtlpSettings | None) -> None:
    """What was given wins, then the variables as OpenTelemetry defines them; without an endpoint nothing is pushed."""
    assert OtlpSettings.read(**given, environment=environment) == expected


@pytest.mark.parametrize(
    ("given", "environment", "complaint"),
    [
        ({"endpoint": "collector:4318"}, {}, "endpoint 'collector:4318'"),
        ({"endpoint": "ftp://c"}, {}, "expected something like http://collector:4318"),
        ({"endpoint": "http://c:99999"}, {}, "endpoint"),
        ({"endpoint": "http://c", "protocol": "carrier pigeon"}, {}, "expected one of grpc, http/protobuf"),
        (
            {"endpoint": "http://c"},
            {"OTEL_METRIC_EXPORT_INTERVAL": "often"},
            "positive number of milliseconds",
        ),
        *(
            (
                {"endpoint": "http://c"},
                {"OTEL_METRIC_EXPORT_INTERVAL": interval},
                "positive number of milliseconds",
            )
            for interval in ("0", "-1", "nan", "inf", "")
        ),
    ],
)
def test_senseless_settings(given: dict, environment: dict[str, str], complaint: str) -> None:
    """One line says what was given and what was expected."""
    with pytest.raises(OtlpError, match=complaint):
        OtlpSettings.read(**given, environment=environment)


@pytest.mark.parametrize("protocol", RECEIVERS)
def test_without_the_extra(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names what to install."""
    kind = protocol.partition("/")[0]
    monkeypatch.setitem(sys.modules, f"opentelemetry.exporter.otlp.proto.{kind}.metric_exporter", None)
    with pytest.raises(OtlpError, match=re.escape("pip install 'optwatch[otlp]'")):
        OtlpExporter(OtlpSettings("http://127.0.0.1:1", protocol))
