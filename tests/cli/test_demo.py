"""``optwatch demo`` as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from optwatch.cli import app
from optwatch.cli.demo import incidents
from optwatch.cli.scrape import parse
from optwatch.optim import AdamW

pytestmark = [pytest.mark.slow, pytest.mark.integration]
TIMEOUT = 300


@pytest.fixture(autouse=True)
def own_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each demo starts an agent of its own."""
    monkeypatch.setenv("OPTWATCH_DIR", str(tmp_path / "boards"))


def demo(*arguments: str) -> list[str]:
    command = [sys.executable, "-m", "optwatch", "demo", "--device", "cpu", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout.splitlines()


def test_it_trains_and_ends_with_a_summary() -> None:
    """Piped: plain lines, then what the state took against fp32, and that it was as asked for."""
    lines = demo("--steps", "6")
    assert re.fullmatch(r"Metrics: http://127\.0\.0\.1:\d+/metrics", lines[0])
    state = re.search(
        r"Optimizer state: (\S+ MB), asked for (\S+ MB); fp32 would take (\S+) MB", "\n".join(lines)
    )
    assert state is not None
    assert state[1] == state[2]
    assert float(state[3]) / float(state[1].split()[0]) > 3.8
    assert any(line.startswith("Done: 6 steps") for line in lines)
    assert not any("promoted" in line for line in lines)


def test_the_injected_resume_is_seen() -> None:
    """From the first step after the resume on, the bytes found are those of fp32, the bytes asked for stay."""
    lines = demo("--steps", "6", "--inject", "fp32-resume")
    assert any(line.startswith("step 3: checkpoint saved, and resumed") for line in lines)
    assert "STATE IS NOT STORED AS ASKED FOR" in next(line for line in lines if line.startswith("step 6 "))
    state = re.search(
        r"Optimizer state: (\S+ MB), asked for (\S+ MB); fp32 would take (\S+ MB)", "\n".join(lines)
    )
    assert state is not None
    assert state[1] == state[3] != state[2]


def test_injected_gradients_are_counted() -> None:
    """Every gradient of the step is not a number, nor is anything after it; the run goes on."""
    lines = demo("--steps", "6", "--inject", "nan-loss")
    assert any(line.startswith("step 3: a batch comes") for line in lines)
    assert any(line.startswith("Done: 6 steps, loss") and line.endswith("-> –.") for line in lines)


def test_the_injected_leak_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of one block are kept at each step, until they are as many bytes as said."""
    block = torch.nn.Linear(10, 10, bias=False)
    model = torch.nn.Sequential(torch.nn.ModuleList([block]))
    block.weight.grad = torch.ones(10, 10)
    monkeypatch.setattr(incidents, "LEAK", 1000)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        incidents.INCIDENTS["leak"].strike(model, optimizer)
    assert sum(kept.numel() for kept in incidents._kept) == 300
    assert incidents.INCIDENTS["leak"].again


def test_every_incident_can_be_asked_for() -> None:
    """The command line names all of them, without importing torch to find out."""
    (option,) = [option for option in app.demo.params if option.name == "inject"]
    assert list(option.type.choices) == list(incidents.INCIDENTS)


def test_it_can_be_scraped_while_it_runs() -> None:
    """The address is printed first; what it serves is this run, and `optwatch top` finds it by itself."""
    command = [sys.executable, "-m", "optwatch", "demo", "--device", "cpu", "--seconds", "12"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[1]
        for line in process.stdout:
            if line.startswith("step "):
                break
        for _ in range(100):  # the agent looks at the board twice a second
            with urllib.request.urlopen(url, timeout=5) as response:
                page = parse(response.read(), url)
            if page.total("optwatch.steps"):
                break
            time.sleep(0.1)
        look = subprocess.run(
            [sys.executable, "-m", "optwatch", "top", "--once"], capture_output=True, text=True, check=False
        )
        process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert page.total("optwatch.rank_up") == 1
    assert look.returncode == 0, look.stderr
    assert url in look.stdout
    assert "running" in look.stdout
    steps = page.total("optwatch.steps")
    assert steps is not None
    assert steps >= 1


def test_an_unknown_device_is_one_line() -> None:
    """What was given and why it cannot be used."""
    command = [sys.executable, "-m", "optwatch", "demo", "--device", "abacus"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert result.returncode == 1
    assert result.stderr.startswith("optwatch: --device 'abacus' cannot be used: ")
    assert len(result.stderr.splitlines()) == 1
