"""What holds for every test: an own board directory, GPU tests only where there is a GPU, no silent skips in CI."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The only skips that CI accepts begin with this: what the machine itself cannot have (an instruction set, an
# operating system). A program that is not installed or a library that was not built is no such reason.
PLATFORM = "platform: "

_refused_skips: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Keep the tests' boards apart from the user's, and find the programs fetched for the tests."""
    directory = tempfile.mkdtemp(prefix="optwatch-tests-")
    config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
    os.environ["OPTWATCH_DIR"] = directory
    os.environ["OPTWATCH_STORE"] = "off"
    os.environ["PATH"] += os.pathsep + str(ROOT / ".tools" / "usr" / "bin")
    if hasattr(config, "workerinput"):
        # One thread a worker: OpenMP's threads spin while they wait, and two teams on the same cores hold each other
        # up for milliseconds at every barrier. Tests of threads ask for theirs.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect GPU tests where there is no GPU: they are no skips, for nothing on this machine could run them.

    With several workers, begin with what takes longest.
    """
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            config.hook.pytest_deselected(items=on_gpu)
            items[:] = [item for item in items if item not in set(on_gpu)]
    if hasattr(config, "workerinput"):
        _order(items)


def _order(items: list[pytest.Item]) -> None:
    """Put files that wait for minutes first, then those with the most tests, as the Makefile's options have it.

    A worker is given its next file as soon as two tests or fewer are left of the one it has: it needs three that wait,
    or that next file would wait with them.
    """
    sizes = Counter(item.path for item in items)
    waiting = {item.path for item in items if item.get_closest_marker("waits")}
    items.sort(key=lambda item: (item.path not in waiting, -sizes[item.path], item.path))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the skips that CI refuses."""
    if report.skipped and not hasattr(report, "wasxfail"):
        _judge_skip(report.nodeid, report.longrepr)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Collect them from whole modules that skip themselves, too."""
    if report.skipped:
        _judge_skip(report.nodeid, report.longrepr)


def _judge_skip(nodeid: str, longrepr: object) -> None:
    reason = str(longrepr[2] if isinstance(longrepr, tuple) else longrepr).removeprefix("Skipped: ")
    if not reason.startswith(PLATFORM):
        _refused_skips.append(f"{nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session for them; a worker hands its own to the process that started it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["refused_skips"] = _refused_skips
    elif _refused_skips and os.environ.get("CI") == "true":
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Take over what a worker refused: skipped modules are reported to the worker only."""
    known = set(_refused_skips)
    _refused_skips.extend(
        s for s in getattr(node, "workeroutput", {}).get("refused_skips", ()) if s not in known
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which skips were refused."""
    if _refused_skips and os.environ.get("CI") == "true":
        terminalreporter.section("skipped, which CI counts as failed", red=True)
        for line in _refused_skips:
            terminalreporter.line(line)
