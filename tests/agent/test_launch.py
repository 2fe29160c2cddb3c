"""Starting an agent from a training process, and never noticing it again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_process import eventually, scrape
from board_samples import Feed, environment, schema
from optwatch.board import BoardWriter, find_agent
from optwatch.hooks.launch import ensure_agent, start_agent, wait_for_agent

ROOT = Path(__file__).parents[2]


def kill_agent(directory: Path) -> int:
    """SIGKILL the agent of a directory; returns its process id."""
    pid = json.loads((directory / "agent.json").read_text())["pid"]
    os.kill(pid, signal.SIGKILL)

    def gone() -> None:
        assert find_agent(directory) is None

    eventually(gone)
    return pid


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory whose agent is ended after the test."""
    yield tmp_path
    if find_agent(tmp_path):
        kill_agent(tmp_path)


def test_no_agent_no_address(directory: Path) -> None:
    """Nothing there, or files left behind by a killed agent: None."""
    assert find_agent(directory) is None
    (directory / "agent.lock").touch()
    (directory / "agent.json").write_text('{"url": "http://127.0.0.1:1/metrics"}')
    assert find_agent(directory) is None


def test_started_once_and_found_by_all(directory: Path) -> None:
    """Many ranks ask at once: one agent starts, in its own session, nicer, with nothing of ours open."""
    Feed(BoardWriter.create(directory, schema())).publish(3)
    code = f"from optwatch.hooks.launch import ensure_agent; ensure_agent({str(directory)!r})"
    ranks = [subprocess.Popen([sys.executable, "-c", code], env=environment()) for _ in range(3)]
    assert [rank.wait(60) for rank in ranks] == [0, 0, 0]
    url = wait_for_agent(directory, 20)
    assert url is not None
    assert scrape(url).one("optwatch_step") == 3
    log = (directory / "agent.log").read_text()
    assert log.count("serving http") == 1
    assert "another agent" not in log
    pid = json.loads((directory / "agent.json").read_text())["pid"]
    assert os.getsid(pid) == pid
    assert os.getpriority(os.PRIO_PROCESS, pid) >= 10
    assert Path(f"/proc/{pid}/fd/0").readlink() == Path("/dev/null")
    assert {Path(f"/proc/{pid}/fd/{fd}").readlink() for fd in (1, 2)} == {directory / "agent.log"}


def test_killed_agent_is_replaced(directory: Path) -> None:
    """After SIGKILL the next call starts another, which serves the same boards; the writer notices nothing."""
    feed = Feed(BoardWriter.create(directory, schema()))
    feed.publish(3)
    start_agent(directory)
    assert wait_for_agent(directory, 20)
    first = kill_agent(directory)
    assert feed.publish()
    assert ensure_agent(directory) is None
    url = wait_for_agent(directory, 20)
    assert url is not None
    assert scrape(url).one("optwatch_step") == 4
    assert json.loads((directory / "agent.json").read_text())["pid"] != first
    assert ensure_agent(directory) == url

    def reaped() -> None:  # the killed one was our child: a later call takes its zombie away
        ensure_agent(directory)
        assert not Path(f"/proc/{first}").exists()

    eventually(reaped)


def test_agent_that_cannot_start_is_not_started_again_at_once(directory: Path) -> None:
    """A claim is good for ten seconds: a broken agent costs one start in that time, not one per call."""
    (directory / "agent.starting").touch()
    assert ensure_agent(directory) is None
    assert not (directory / "agent.log").exists()
    os.utime(directory / "agent.starting", (1, 1))
    assert ensure_agent(directory) is None
    assert wait_for_agent(directory, 20)


@pytest.mark.integration
def test_a_pipeline_ends_with_training(directory: Path) -> None:
    """``python train.py | tee log`` ends when training ends, though the agent lives on."""
    (directory / "train.py").write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from board_samples import Feed, schema\n"
        "from optwatch.board import BoardWriter\n"
        "from optwatch.hooks.launch import ensure_agent, wait_for_agent\n"
        f"feed = Feed(BoardWriter.create({str(directory)!r}, schema()))\n"
        "feed.publish(5)\n"
        f"ensure_agent({str(directory)!r})\n"
        f"print(wait_for_agent({str(directory)!r}, 20))\n"
    )
    # A third descriptor, as job launchers leave them open, must not reach the agent either.
    pipeline = f"{sys.executable} train.py 3>&1 2>&1 | tee log"
    done = subprocess.run(
        ["/bin/sh", "-c", pipeline], cwd=directory, capture_output=True, text=True, timeout=60, check=True
    )
    url = find_agent(directory)
    assert url is not None, "the agent went with the training process"
    assert done.stdout == f"{url}\n"
    assert (directory / "log").read_text() == done.stdout

    def lost() -> None:
        page = scrape(url)
        assert page.one("optwatch_rank_up") == 0
        assert page.one("optwatch_step") == 5

    eventually(lost)


def test_modules_beside_the_training_script_are_no_modules_of_the_agent(directory: Path, monkeypatch) -> None:
    """A ``json.py`` or ``queue.py`` in the working directory must not break the agent."""
    for name in ("json", "queue", "logging", "socket"):
        (directory / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    monkeypatch.delenv("PYTHONPATH", raising=False)  # what the user puts there is the user's will
    monkeypatch.chdir(directory)
    start_agent(directory)
    assert wait_for_agent(directory, 20), (directory / "agent.log").read_text()


def test_waiting_has_an_end(directory: Path) -> None:
    """Without an agent the wait ends after the time given."""
    started = time.monotonic()
    assert wait_for_agent(directory, 0.1) is None
    assert time.monotonic() - started >= 0.1
