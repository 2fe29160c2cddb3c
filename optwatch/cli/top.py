"""``optwatch top``: the live view of a running agent, from its metrics endpoint alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import click
from rich.console import Console
from rich.live import Live

from optwatch.cli.scrape import ScrapeError, default_url, fetch, normalise_url
from optwatch.cli.snapshot import Snapshot, Tracker
from optwatch.cli.view import draw, line

LIVE_SECONDS = 1.0  # between scrapes on a terminal
PLAIN_SECONDS = 5.0  # between lines when stdout is no terminal
GIVE_UP_SECONDS = 30.0  # without an answer


def run_top(url: str | None, *, interval: float | None, once: bool) -> None:
    """Show the agent at ``url`` (by default this user's) until it is interrupted or the agent is gone.

    Raises:
        ScrapeError: nothing answers there, or something that is no agent.
    """
    url = normalise_url(url) if url else default_url()
    tracker = Tracker()
    snapshot = tracker.update(fetch(url))
    console = Console()
    if once:
        console.print(draw(snapshot, url))
    elif console.is_terminal:
        _follow_live(console, url, tracker, snapshot, interval or LIVE_SECONDS)
    else:
        _follow(url, tracker, interval or PLAIN_SECONDS, _echo, snapshot)


def _echo(snapshot: Snapshot, note: str) -> None:
    click.echo(note or line(snapshot))


def _follow_live(console: Console, url: str, tracker: Tracker, snapshot: Snapshot, interval: float) -> None:
    with Live(draw(snapshot, url), console=console, screen=True, auto_refresh=False) as live:

        def show(found: Snapshot, note: str) -> None:
            live.update(draw(found, url, note), refresh=True)

        _follow(url, tracker, interval, show, snapshot)


def _follow(
    url: str, tracker: Tracker, interval: float, show: Callable[[Snapshot, str], None], snapshot: Snapshot
) -> None:
    """Scrape and show for ever. While the agent does not answer, the old values are shown and told to be old."""
    answered = time.monotonic()
    note = ""
    while True:
        show(snapshot, note)
        time.sleep(interval)
        try:
            snapshot, note = tracker.update(fetch(url)), ""
            answered = time.monotonic()
        except ScrapeError as error:
            silence = time.monotonic() - answered
            if silence > GIVE_UP_SECONDS:
                raise
            note = f"values are {silence:.0f} s old: {error.format_message()}"
