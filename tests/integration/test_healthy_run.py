"""Ten minutes of healthy training, and a run that ends as runs do: nobody is woken, nobody even gets a mail.

Two Prometheus look at the same agent: one with the rules and intervals as they are shipped, and one for which a minute
of the rules lasts six seconds, so that their hours pass, too. Almost all of it is waiting.
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

# The first test lasts longer than a test may: it waits for the run.
pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.waits, pytest.mark.timeout(1000)]

SECONDS = 600
FINISH = 120  # seconds until the other run ends
GRACE = 60  # seconds for which the agent shows it after that
MINUTE = 6  # seconds in a minute of the fast rules
RUNS = ("healthy", "healthy:1", "finished")


@dataclass
class Stage:
    """Everything that runs; `healthy` is the leader of the processes that train."""

    prometheus: dict[str, PrometheusServer]
    webhook: Webhook
    healthy: int
    said: int  # notifications in the ten minutes


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Ten minutes later."""
    root = tmp_path_factory.mktemp("stage")
    boards, signs = root / "boards", root / "signs"
    boards.mkdir(mode=0o700)
    signs.mkdir()
    fast = root / "optwatch.rules.yml"
    fast.write_text(rules.generate(minute=MINUTE), encoding="utf-8")
    shipped = Path(__file__).parents[2] / rules.DEFAULT_PATH
    with (
        agent(boards, f"--grace={GRACE}") as (url, _),
        alertmanager(root / "alertmanager") as (address, webhook),
        PrometheusServer(root / "a", url, [shipped], alertmanager=address, shipped=True) as as_shipped,
        PrometheusServer(root / "b", url, [fast], alertmanager=address) as hurried,
        (root / "runs.log").open("wb") as log,
    ):
        script = Path(__file__).with_name("troubled_runs.py")
        given = {**environment(), "OPTWATCH_DIR": str(boards), "OMP_NUM_THREADS": "1"}
        runs = subprocess.Popen(
            [sys.executable, script, signs, *RUNS], stdout=log, stderr=log, env=given, start_new_session=True
        )
        try:
            start = time.monotonic()
            hurried.wait_for(f"count(optwatch_steps_total > 3) == {len(RUNS)}", 90)
            time.sleep(FINISH)
            (signs / "finished.break").touch()
            time.sleep(SECONDS - (time.monotonic() - start))
            servers = {"as shipped": as_shipped, "hurried": hurried}
            yield Stage(servers, webhook, runs.pid, len(webhook.received))
        finally:
            os.killpg(runs.pid, signal.SIGKILL)
            runs.wait()


@pytest.mark.parametrize("rules", ["as shipped", "hurried"])
def test_nothing_fires(rules: str, stage: Stage) -> None:
    """At no evaluation of the ten minutes, about no run."""
    firing = 'count_over_time(ALERTS{alertstate="firing"}[1h])'
    assert [one["metric"] for one in stage.prometheus[rules].query(firing)] == []
    assert set(stage.prometheus[rules].rules_health().values()) == {"ok"}
    assert stage.webhook.received[: stage.said] == []


@pytest.mark.parametrize("rules", ["as shipped", "hurried"])
def test_both_runs_were_watched(rules: str, stage: Stage) -> None:
    """Ten minutes of scrapes that all succeeded, one run stepping to the end, the other finished and forgotten."""
    server = stage.prometheus[rules]
    assert server.value("min_over_time(up[1h])") == 1
    first, last = (server.value(f"{end}_over_time(timestamp(up)[1h:1s])") for end in ("min", "max"))
    # A scrape in 15 s: up to two intervals are missing, which leaves 570 s to the dot.
    assert last - first > SECONDS - 45
    assert len(server.query('increase(optwatch_steps_total{run_id="healthy"}[1m]) > 60')) == 2
    assert (
        server.value('max(max_over_time(optwatch_run_state{run_id="finished", state="finished"}[1h]))') == 1
    )
    assert server.query('optwatch_rank_up{run_id="finished"}') == []


def test_the_line_was_there(stage: Stage) -> None:
    """Killed after all, the healthy run reaches the webhook: silence was no accident."""
    os.killpg(stage.healthy, signal.SIGKILL)
    end = time.monotonic() + 90
    while not stage.webhook.find("RankMissing", "healthy", "firing"):
        assert time.monotonic() < end, stage.prometheus["hurried"].alerts()
        time.sleep(0.2)
