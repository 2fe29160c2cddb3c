"""Every query of every dashboard gives data, and so does every metric, whether they are scraped or pushed.

One run that has everything, with GPUs from the stand-in for the driver's library. The agent is scraped by one real
Prometheus, and pushes over gRPC to a receiver whose samples another one gets.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_process import eventually
from node import RULES, node
from optwatch.metrics.catalogue import CATALOGUE
from optwatch.metrics.spec import MetricSpec
from otlp_conversion import TARGET, as_scrape
from otlp_receivers import over_grpc
from prometheus_server import PrometheusServer

pytestmark = pytest.mark.integration

BOARDS = [
    json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((Path(__file__).parents[2] / "optwatch/dashboards").glob("*.json"))
]
WAYS = ("scraped", "pushed")
#: What Grafana would fill in; the run is young, so windows are short.
CHOSEN = {"run": "eventful", "job": "optwatch", "optimizer": ".+", "group": ".+", "rank": ".+"}
INTERVALS = {"$__rate_interval": "20s", "$__range": "1m", "offset 1m": "offset 3s"}


def _queries() -> Iterator[tuple[str, str]]:
    """Name and expression of everything that a dashboard asks."""
    for board in BOARDS:
        name = board["uid"].removeprefix("optwatch-")
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                yield f"{name}: {panel['title']} {target['refId']}", target["expr"]
        for variable in board["templating"]["list"][1:]:
            found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert found
            yield f"{name}: the variable {variable['name']}", f"group by ({found[2]}) ({found[1]})"
        for mark in board["annotations"]["list"]:
            yield f"{name}: the annotation {mark['name']}", mark["expr"]


QUERIES = list(_queries())


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, PrometheusServer]]:
    """Both Prometheus; the run has taken its first steps, and one GPU told of an error."""
    root = tmp_path_factory.mktemp("node")
    command = [sys.executable, Path(__file__).with_name("eventful_run.py")]
    with over_grpc() as received, as_scrape(received) as url:
        push = (f"--otlp-endpoint={received.url}", "--otlp-protocol=grpc", "--otlp-interval=1")
        # Prometheus calls its own job otherwise, so that what it knows of this target is not taken for an agent's.
        scrape = {"job_name": "collector", "honor_labels": True}
        with (
            PrometheusServer(root / "collector", url, [RULES], scrape) as pushed,
            node(root / "node", command, *push, gpus=2) as running,
        ):
            assert running.driver
            process = f"process 0 {running.training.pid} 3000000000"
            running.driver.order("devices 2", process, "xid 0 79")
            (running.boards / "broken-0.board").write_bytes(b"not a board")
            yield {"scraped": running.prometheus, "pushed": pushed}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "expr"), QUERIES, ids=[name for name, _ in QUERIES])
def test_has_data(name: str, expr: str, way: str, servers: dict[str, PrometheusServer]) -> None:
    """For the run, optimizers, groups and ranks that are chosen."""
    for placeholder, interval in INTERVALS.items():
        expr = expr.replace(placeholder, interval)
    for variable, value in CHOSEN.items():
        expr = re.sub(rf"\${variable}\b", value, expr)
    assert "$" not in expr
    assert servers[way].wait_for(expr, 45)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", CATALOGUE.values(), ids=lambda spec: spec.prometheus)
def test_every_metric_answers(spec: MetricSpec, way: str, servers: dict[str, PrometheusServer]) -> None:
    """With the labels of the catalogue, and values that make sense."""
    for name in spec.samples:
        # The run's gradients are poisoned now and then: for a moment some values are NaN.
        for one in servers[way].wait_for(f"{name} < Inf"):
            labels = set(one["metric"]) - TARGET - {"__name__", "le"}
            assert labels <= set(spec.labels)
            # An empty label is none to Prometheus; only facts may be unknown.
            assert labels == set(spec.labels) or spec.instrument == "info"
            value = float(one["value"][1])
            assert value == 1 or spec.instrument != "info"
            assert 0 <= value <= 1 or not spec.name.endswith("unchanged.ratio")


def test_pushed_series_are_those_of_a_scrape(servers: dict[str, PrometheusServer]) -> None:
    """The same names and labels, but for those of the target, over all that happens to the run again and again."""

    def seen(way: str) -> set[tuple[tuple[str, str], ...]]:
        series = servers[way].query('last_over_time({__name__=~"optwatch_.+", job="optwatch"}[10m])')
        return {
            tuple(sorted((name, value) for name, value in one["metric"].items() if name not in TARGET))
            for one in series
            # Until the first step some facts are unknown: whoever asks soon enough has such a series, for ever.
            if "unknown" not in one["metric"].values()
        }

    def check() -> None:
        assert seen("scraped") == seen("pushed")

    # A series that has just begun may not have arrived on the other way.
    eventually(check, 60)
