"""An agent in a process of its own, for tests: started, found, scraped, ended."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

import board_samples
from optwatch.board import find_agent


class Scrape:
    """The samples of one scrape, looked up by name and some of the labels."""

    def __init__(self, text: str) -> None:
        self.samples = [s for family in text_string_to_metric_families(text) for s in family.samples]

    def all(self, name: str, **labels: str) -> list[float]:
        """Values of all series that have these labels."""
        return [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]

    def one(self, name: str, **labels: str) -> float:
        """The value of the only one."""
        (value,) = self.all(name, **labels)
        return value


def get(url: str, accept: str = "") -> tuple[str, bytes]:
    """Content type and body of a page."""
    request = urllib.request.Request(url, headers={"Accept": accept} if accept else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read()


def scrape(url: str) -> Scrape:
    """One scrape, parsed by the official parser."""
    return Scrape(get(url)[1].decode())


def eventually(check: Callable[[], object], seconds: float = 20.0) -> None:
    """Try until the check raises no AssertionError; the last one is raised."""
    end = time.monotonic() + seconds
    while True:
        try:
            check()
        except AssertionError:
            if time.monotonic() > end:
                raise
            time.sleep(0.03)
        else:
            return


def wait_for_agent(directory: Path) -> str:
    """The address of the agent that was just started."""

    def found() -> None:
        assert find_agent(directory), (directory / "agent-test.log").read_text()

    eventually(found)
    return str(find_agent(directory))


@contextmanager
def agent(
    directory: Path, *options: str, environment: Mapping[str, str] | None = None, before: str = ""
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address and the process of an agent that polls quickly; its log is ``agent-test.log``.

    ``before`` is code that the process runs first.
    """
    start = "import sys; from optwatch.agent.__main__ import main; sys.exit(main())"
    command = [
        sys.executable,
        *(("-c", f"{before}\n{start}") if before else ("-m", "optwatch.agent")),
        "--dir",
        str(directory),
        "--interval",
        "0.05",
        "--port",
        "0",
    ]
    with (directory / "agent-test.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, *options],
            stdout=log,
            stderr=log,
            env={**board_samples.environment(), **(environment or {})},
        )
    try:
        yield wait_for_agent(directory), process
    finally:
        process.kill()
        process.wait()
    assert find_agent(directory) is None
