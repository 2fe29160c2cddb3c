"""The whole line: the demo trains, a real Prometheus scrapes the agent, and its rules see what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from node import Node, demo, node
from prometheus_server import PrometheusServer

pytestmark = pytest.mark.integration

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
