"""The whole line: the demo trains, a real Prometheus scrapes the agent, and queries get what the catalogue promises."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import promql_parser
import pytest

from node import Node, demo, node
from optwatch.metrics.catalogue import CATALOGUE
from optwatch.metrics.fields import STEP
from optwatch.metrics.spec import MetricSpec
from prometheus_server import PrometheusServer
from promql import selectors

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
BOARDS = [
    json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "optwatch/dashboards").glob("*"))
]

#: What only some training loops have: they log more than a loss, clip, or something happens to them.
OCCASIONAL = {
    "optwatch.scalar",
    "optwatch.training.tokens",
    "optwatch.training.samples",
    "optwatch.last_event_timestamp",
    "optwatch.gradient.norm_before_clipping",
    "optwatch.gradient_clip.ratio",
}
#: What needs no GPU, and no optimizer but ours: blocks are sampled of others', or where a shadow was asked for.
SPECS = [
    spec
    for spec in CATALOGUE.values()
    if not spec.requires and spec.name not in OCCASIONAL and spec.family == STEP
]
SECONDS = 80  # the demo breaks its own state half-way


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """The demo, the agent and Prometheus with the project's rules; one of the boards is broken."""
    root = tmp_path_factory.mktemp("node")
    with node(root, demo(SECONDS, "--inject=fp32-resume")) as running:
        (running.boards / "broken-0.board").write_bytes(b"not a board")
        yield running


@pytest.fixture(scope="module")
def prometheus(stage: Node) -> PrometheusServer:
    """Prometheus, that of the stage."""
    return stage.prometheus


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.prometheus)
def test_every_metric_answers(spec: MetricSpec, prometheus: PrometheusServer) -> None:
    """Each metric that needs no GPU has series, with the labels of the catalogue, and values that make sense."""
    for name in spec.samples:
        series = prometheus.wait_for(name)
        for one in series:
            labels = set(one["metric"]) - {"__name__", "instance", "job", "le"}
            assert labels <= set(spec.labels)
            # An empty label is none to Prometheus; only facts may be unknown.
            assert labels == set(spec.labels) or spec.instrument == "info"
            value = float(one["value"][1])
            assert math.isfinite(value)
            assert value == 1 or spec.instrument != "info"
            assert 0 <= value <= 1 or not spec.name.endswith("unchanged.ratio")


def _targets() -> Iterator[tuple[str, str]]:
    for panel in (panel for board in BOARDS for panel in board["panels"]):
        for target in panel.get("targets", ()):
            expr = target["expr"].replace("$__rate_interval", "20s").replace("$__range", "1m")
            names = [found.name for found in selectors(promql_parser.parse(expr))]
            if names == ["ALERTS"]:  # none is what a healthy run shows
                continue
            specs = [CATALOGUE.sample(name) for name in names]
            if not any(spec is not None and spec.requires for spec in specs):
                yield panel["title"], expr


TARGETS = list(_targets())
NAMES = [f"{title} {number}" for number, (title, _) in enumerate(TARGETS)]


@pytest.mark.parametrize(("panel", "expr"), TARGETS, ids=NAMES)
def test_every_panel_shows_data(panel: str, expr: str, prometheus: PrometheusServer) -> None:
    """Each expression of the dashboard that needs no GPU gives data for the chosen run."""
    run = prometheus.query("optwatch_rank_up")[0]["metric"]["run_id"]
    filled = expr.replace("$run", run)
    for variable in ("$job", "$optimizer", "$group", "$rank"):
        filled = filled.replace(variable, ".+")
    # A rate needs two samples; full statistics come every ten steps.
    assert prometheus.wait_for(filled)


def test_rules_are_healthy(prometheus: PrometheusServer) -> None:
    """Prometheus evaluates every rule, and what is recorded for a running rank has values."""
    prometheus.wait_for("run_rank_optimizer:optwatch_optimizer_state_bytes_per_parameter:ratio")
    prometheus.wait_for("run_optimizer_group:optwatch_update_quantization_error_ratio:max")
    assert set(prometheus.rules_health().values()) == {"ok"}


def test_a_healthy_run_raises_no_alert(prometheus: PrometheusServer) -> None:
    """Nothing fires or waits, but for what the demo breaks itself half-way."""
    assert set(prometheus.alerts()) <= {"StateBytesUnexpected"}


def test_a_resume_that_promotes_state_is_caught(prometheus: PrometheusServer) -> None:
    """Found and asked for part at the first step after the resume, and the alert begins to wait."""
    error = prometheus.value("max(optwatch_update_quantization_error_ratio)")
    assert 0 < error < 0.25, "int8 state: some error, but none that harms"
    asked = prometheus.value("sum(optwatch_optimizer_state_expected_bytes)")
    prometheus.wait_for(
        "sum(optwatch_optimizer_state_bytes) != sum(optwatch_optimizer_state_expected_bytes)", SECONDS
    )
    assert prometheus.value("sum(optwatch_optimizer_state_expected_bytes)") == asked
    assert prometheus.value("sum(optwatch_optimizer_state_bytes)") > 3.5 * asked
    assert {one["metric"]["dtype"] for one in prometheus.query("optwatch_optimizer_state_bytes > 0")} == {
        "float32"
    }
    prometheus.wait_for('ALERTS{alertname="StateBytesUnexpected"}')
    assert "StateBytesUnexpected" in prometheus.alerts()


def test_a_killed_rank_keeps_its_last_values(stage: Node, prometheus: PrometheusServer) -> None:
    """After SIGKILL: rank_up 0, lost, the last step still served, and the alert begins to wait."""
    assert stage.training.poll() is None, "the demo ended before it could be killed"
    step = prometheus.value("optwatch_step")
    stage.training.kill()
    stage.training.wait()
    prometheus.wait_for("optwatch_rank_up == 0")
    prometheus.wait_for('optwatch_run_state{state="lost"} == 1')
    assert prometheus.value("optwatch_step") >= step
    prometheus.wait_for('ALERTS{alertname="RankMissing"}')
