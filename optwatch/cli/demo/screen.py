"""The demo's window: the same view as `optwatch top`, drawn from the metrics endpoint while training goes on."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

import click
from rich.console import Console
from rich.live import Live

from optwatch.cli.scrape import ScrapeError, fetch
from optwatch.cli.snapshot import RunView, Snapshot, Tracker
from optwatch.cli.top import LIVE_SECONDS, PLAIN_SECONDS
from optwatch.cli.view import count, draw, line, number, percent, size


class Screen:
    """Shows the run that the agent at ``url`` serves, from a thread of its own; a context manager.

    Scraping may fail, for example while the agent starts: the last values stay, and a note says how old they are.
    """

    def __init__(self, url: str | None, run_id: str) -> None:
        self._url = url
        self._run_id = run_id
        self._console = Console()
        self._live: Live | None = None
        self._tracker = Tracker()
        self._snapshot = Snapshot(runs=(), devices=())
        self._story = _Story()
        self.step = 0  # set by the training loop, for when nothing can be scraped
        self._note = ""
        self._answered = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="optwatch-demo-screen", daemon=True)

    def __enter__(self) -> Screen:
        """Start drawing."""
        address = self._url or "not served: no agent could be started, see the warning"
        click.echo(f"Metrics: {address}")
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        sys.stdout.flush()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Draw once more and stop."""
        self._stop.set()
        self._thread.join(timeout=10)
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line above the view."""
        self._console.print(text, highlight=False, soft_wrap=not self._console.is_terminal)

    def summarise(self) -> None:
        """Print what happened."""
        if self._snapshot.runs:
            for text in self._story.summary(self._snapshot.runs[0]):
                self.say(text)
        else:
            self.say(f"Done: {self.step} steps; no metrics were seen.")

    def _follow(self) -> None:
        shown = time.monotonic()
        while not self._stop.wait(LIVE_SECONDS):
            self._look()
            if self._live is not None or time.monotonic() - shown > PLAIN_SECONDS:
                shown = time.monotonic()
                self._show()
        # The last steps reach the page within one more of the agent's rounds.
        time.sleep(LIVE_SECONDS)
        self._look()
        self._show()

    def _look(self) -> None:
        try:
            if self._url is not None:
                everything = self._tracker.update(fetch(self._url))
                runs = tuple(run for run in everything.runs if run.run_id == self._run_id)
                self._snapshot = Snapshot(runs=runs, devices=everything.devices)
                self._answered, self._note = time.monotonic(), ""
        except ScrapeError as error:
            self._note = f"values are {time.monotonic() - self._answered:.0f} s old: {error.format_message()}"
        for run in self._snapshot.runs:
            self._story.add(run)

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(draw(self._snapshot, self._url or "", self._note), refresh=True)
        else:
            seen = line(self._snapshot) if self._snapshot.runs else f"step {self.step}, no metrics yet"
            self.say(self._note or seen)


class _Story:
    """What the run's snapshots add up to."""

    def __init__(self) -> None:
        self._first_loss: float | None = None
        self._worst_update_error = 0.0
        self._asked_for: float | None = None
        self._promoted_at: float | None = None

    def add(self, run: RunView) -> None:
        """Take the newest snapshot in."""
        if self._first_loss is None:
            self._first_loss = run.loss
        self._worst_update_error = max(self._worst_update_error, run.update_error or 0.0)
        if not run.as_expected and self._promoted_at is None:
            self._promoted_at = run.step

    def summary(self, run: RunView) -> list[str]:
        """The closing lines."""
        lines = [
            f"Done: {count(run.step)} steps, loss {number(self._first_loss)} -> {number(run.loss)}.",
            (
                f"Optimizer state: {size(run.actual_bytes)}, asked for {size(run.expected_bytes)}; "
                f"fp32 would take {size(run.fp32_bytes)}."
            ),
            f"Largest update error from quantisation: {percent(self._worst_update_error)}.",
            f"Watching took {percent(run.mean_overhead_ratio)} of the training time.",
        ]
        if self._promoted_at is not None:
            lines.append(
                f"Seen by step {count(self._promoted_at)}: the state was no longer stored as asked for; the resume had "
                "promoted it to fp32. Training went on as if nothing had happened: only the bytes tell."
            )
        return lines
