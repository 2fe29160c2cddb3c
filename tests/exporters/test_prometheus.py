"""Every metric of the catalogue, through the exporter and back by the official parsers."""

from __future__ import annotations

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from optwatch.exporters import HistogramValue, Point
from optwatch.exporters.prometheus import PrometheusExporter
from optwatch.metrics.catalogue import CATALOGUE

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def point(name: str, value: float = 2.5) -> Point:
    """A point with all labels of a metric, awkward characters included."""
    spec = CATALOGUE[name]
    labels = {label: f'{label}-"\\\n' for label in spec.labels}
    if spec.instrument == "histogram":
        counts = tuple(float(i) for i in range(len(spec.buckets) + 1))
        return Point(labels, HistogramValue(spec.buckets, counts, 7.5))
    return Point(labels, 1.0 if spec.instrument == "info" else value)


def rendered(snapshot, accept: str = "") -> str:
    exporter = PrometheusExporter()
    exporter.accept(snapshot)
    return exporter.render(accept)[1].decode()


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize(("accept", "parse"), [("", parse_text), (OPENMETRICS, parse_openmetrics)])
def test_each_metric_survives(name: str, accept: str, parse) -> None:
    """The names are the catalogue's, the labels and values those of the point, the help its brief."""
    spec, given = CATALOGUE[name], point(name)
    (family,) = parse(rendered({name: [given]}, accept))
    assert family.documentation == spec.brief
    assert {sample.name for sample in family.samples} == set(spec.samples)
    for sample in family.samples:
        bound = sample.labels.pop("le", None)
        assert sample.labels == given.labels
        if spec.instrument != "histogram":
            assert sample.value == given.value
        elif sample.name.endswith("_sum"):
            assert sample.value == 7.5
        elif sample.name.endswith("_count") or bound == "+Inf":
            assert sample.value == sum(given.value.counts)
        else:
            index = spec.buckets.index(float(bound))
            assert sample.value == sum(given.value.counts[: index + 1])


def test_absent_is_absent() -> None:
    """A metric without points has no family, not a zero."""
    assert "optwatch" not in rendered({})
    assert "optwatch" not in rendered({"optwatch.loss": []})


def test_sick_values_are_shown() -> None:
    """NaN and the infinities are values."""
    points = [
        Point({"run_id": "r", "rank": str(i)}, v)
        for i, v in enumerate([float("nan"), float("inf"), -float("inf")])
    ]
    lines = [line.split()[-1] for line in rendered({"optwatch.loss": points}).splitlines() if line[0] != "#"]
    assert lines == ["NaN", "+Inf", "-Inf"]


def test_rendered_once_per_snapshot() -> None:
    """The same bytes object for the same snapshot and format; new ones for a new snapshot."""
    exporter = PrometheusExporter()
    exporter.accept(first := {"optwatch.loss": [point("optwatch.loss")]})
    body = exporter.render()[1]
    exporter.accept(first)
    assert exporter.render()[1] is body
    exporter.accept({"optwatch.loss": [point("optwatch.loss", 3.0)]})
    assert exporter.render()[1] != body


class Counted(dict):
    """A snapshot that counts how often it is rendered."""

    renderings = 0

    def get(self, key, default=None):
        """The points of a metric; each rendering asks for each metric once."""
        self.renderings += key == "optwatch.loss"
        return super().get(key, default)


def test_rendered_before_it_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the formats that were asked for within a minute, two at most; a scrape then renders nothing."""
    exporter, now = PrometheusExporter(), 0.0
    monkeypatch.setattr("optwatch.exporters.prometheus.time.monotonic", lambda: now)

    def accepted() -> Counted:
        exporter.accept(made := Counted({"optwatch.loss": [point("optwatch.loss", now)]}))
        return made

    assert not exporter.wanted
    first = accepted()
    assert first.renderings == 0
    for _ in range(3):
        exporter.render()
    assert first.renderings == 1
    exporter.render(OPENMETRICS)
    assert first.renderings == 2

    now = 59.0
    second = accepted()
    assert second.renderings == 2
    assert f"{now}" in exporter.render()[1].decode()
    assert second.renderings == 2

    now = 61.0
    assert accepted().renderings == 1  # OpenMetrics was last wanted at 0
    for version in ("1.0.1", "1.0.2", "1.0.3"):
        exporter.render(f"application/openmetrics-text; version={version}")
    assert accepted().renderings == 2

    now = 122.0
    assert not exporter.wanted
    assert accepted().renderings == 0
