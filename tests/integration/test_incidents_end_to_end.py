"""From the kernel to whoever is woken: training, agent, Prometheus with the shipped rules, Alertmanager, webhook.

All runs train side by side, so that their waits pass together. A minute of the rules lasts a second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent_process import agent
from alertmanager_server import Webhook, alertmanager
from board_samples import environment
from deploy.prometheus import rules
from prometheus_server import PrometheusServer

pytestmark = [pytest.mark.integration, pytest.mark.slow]

RUNBOOKS = "https://runbooks.example"
BREAK = 15  # seconds of peace first: alerts that compare with the past need some

#: Run -> the alert that tells, and the receiver that it reaches.
INCIDENTS = {
    "promoted": ("StateBytesUnexpected", "critical"),
    "poisoned": ("NonFiniteUpdates", "critical"),
    "skipping": ("NonFiniteGradients", "warning"),
    "stalled": ("TrainingStalled", "critical"),
    "killed": ("RankMissing", "critical"),
    "leaking": ("MemoryLeak", "warning"),
}


@dataclass
class Stage:
    """Everything that runs."""

    prometheus: PrometheusServer
    webhook: Webhook
    signs: Path  # files that break and repair runs


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """All runs have broken, been noticed, been repaired; or have not, for which the tests then fail."""
    root = tmp_path_factory.mktemp("stage")
    boards, signs = root / "boards", root / "signs"
    boards.mkdir(mode=0o700)
    signs.mkdir()
    file = root / "optwatch.rules.yml"
    file.write_text(rules.generate(RUNBOOKS, minute=1), encoding="utf-8")
    with (
        agent(boards) as (url, _),
        alertmanager(root / "alertmanager") as (address, webhook),
        PrometheusServer(root / "prometheus", url, [file], alertmanager=address) as prometheus,
        (root / "runs.log").open("wb") as log,
    ):
        script = Path(__file__).with_name("troubled_runs.py")
        given = {**environment(), "OPTWATCH_DIR": str(boards), "OMP_NUM_THREADS": "1"}
        runs = subprocess.Popen(
            [sys.executable, script, signs], stdout=log, stderr=log, env=given, start_new_session=True
        )
        try:
            prometheus.wait_for(f"count(optwatch_steps_total > 3) == {len(INCIDENTS) + 2}", 90)
            time.sleep(BREAK)
            _break_all(signs)
            wait_until(
                lambda: all(webhook.find(name, run, "firing") for run, (name, _) in INCIDENTS.items()), 75
            )
            for run in INCIDENTS:
                (signs / f"{run}.repair").touch()
            wait_until(
                lambda: all(webhook.find(name, run, "resolved") for run, (name, _) in INCIDENTS.items()), 45
            )
            yield Stage(prometheus, webhook, signs)
        finally:
            os.killpg(runs.pid, signal.SIGKILL)
            runs.wait()


def _break_all(signs: Path) -> None:
    for run in (*INCIDENTS, "finished"):
        (signs / f"{run}.break").touch()
    os.kill(int((signs / "killed.pid").read_text()), signal.SIGKILL)


def wait_until(check: object, seconds: float) -> None:
    """Wait at most so long; whoever asks later finds what is missing."""
    end = time.monotonic() + seconds
    while not check() and time.monotonic() < end:
        time.sleep(0.2)


@pytest.mark.parametrize("run", INCIDENTS)
def test_an_incident_reaches_the_webhook_with_its_runbook(run: str, stage: Stage) -> None:
    """At the receiver of its severity, naming the run, with a link to the page that says what to do."""
    name, receiver = INCIDENTS[run]
    found = stage.webhook.find(name, run, "firing")
    assert found, f"only {sorted(stage.webhook.names(run))} arrived; now active: {stage.prometheus.alerts()}"
    assert found[0] == receiver
    assert found[1]["annotations"]["runbook_url"] == f"{RUNBOOKS}/{name}.md"
    assert run in found[1]["annotations"]["description"]


@pytest.mark.parametrize("run", INCIDENTS)
def test_a_repaired_run_resolves(run: str, stage: Stage) -> None:
    """The state loaded as it should be, the process started again, the leak closed."""
    assert stage.webhook.find(INCIDENTS[run][0], run, "resolved"), stage.prometheus.alerts()


def test_promoted_state_is_told_within_three_evaluations(stage: Stage) -> None:
    """From the first evaluation that sees it until the webhook has it, the rules were evaluated at most three times."""
    found = stage.webhook.find("StateBytesUnexpected", "promoted", "firing")
    assert found
    seen = 'sum(count_over_time(ALERTS{alertname="StateBytesUnexpected", run_id="promoted"}[5m]))'
    ((_, evaluations),) = [one["value"] for one in stage.prometheus.query(seen, time=f"{found[2]:.3f}")]
    assert 1 <= int(evaluations) <= 3


@pytest.mark.parametrize("run", ["healthy", "finished"])
def test_a_run_without_an_incident_raises_nothing(run: str, stage: Stage) -> None:
    """Neither while it trains, nor after it ended as runs do; not even an alert that waits."""
    assert stage.webhook.names(run) == set()
    assert stage.prometheus.query(f'ALERTS{{run_id="{run}"}}') == []
    assert (
        stage.prometheus.query(f'count_over_time(ALERTS{{run_id="{run}", alertstate="firing"}}[10m])') == []
    )
