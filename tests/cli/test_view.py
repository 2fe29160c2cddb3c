"""What a person sees."""

import io
import math
import re
import time

import pytest
from rich.console import Console

from cli.pages import RUN, page, sample
from optwatch.cli.scrape import parse
from optwatch.cli.snapshot import Snapshot, Tracker
from optwatch.cli.view import count, curve, draw, line, number, percent, size


def drawn(text: str, width: int = 100) -> str:
    shown = io.StringIO()
    console = Console(width=width, file=shown)
    console.print(draw(Tracker().update(parse(text.encode(), "test")), "http://127.0.0.1:9464/metrics"))
    return shown.getvalue()


def test_the_view_shows_what_a_run_is_judged_by() -> None:
    """Step, loss, speed, bytes by slot against fp32, update error, norms by group, memory, overhead, address."""
    text = drawn(page())
    for shown in (
        "20261122-143255-9d86", "running", "100", "3.50", "5.00 steps/s", "host 500 MB", "0.100 % of the time",
        "int8 + fp32 + bf16", "4.19 MB", "16.0 MB", "74 %", "blocks 0-1", "3.00 %", "http://127.0.0.1:9464/metrics",
    ):  # fmt: skip
        assert shown in text, shown
    assert "not stored as asked for" not in text


def test_events_and_tokens_are_shown_where_there_are_any() -> None:
    """How often each happened; nothing of those that did not."""
    lines = [
        sample("optwatch.events", 3, **RUN, event="checkpoint"),
        sample("optwatch.events", 0, **RUN, event="oom"),
        sample("optwatch.last_event_timestamp", time.time() - 12, **RUN, event="checkpoint"),
        sample("optwatch.training.tokens", 20_000, **RUN),
    ]
    text = drawn("\n".join([page(seconds=20.0).strip(), *lines, ""]))
    assert re.search(r"checkpoint 3 times, [12]\d s ago", text)
    assert "oom" not in text
    assert "tokens/s" in text
    assert "tokens/s" not in drawn(page())


def test_promoted_state_is_called_out() -> None:
    """Where bytes found and asked for differ, a sentence says so with both figures."""
    text = " ".join(drawn(page(fp32=True), width=200).split())
    assert "not stored as asked for: exp_avg takes 16.0 MB as fp32, 4.19 MB were asked for" in text


def test_the_view_fits_eighty_columns() -> None:
    """No figure is cut off in the smallest usual terminal."""
    text = drawn(page(fp32=True), width=80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_no_run_is_no_error() -> None:
    """An agent before its first run."""
    empty = Snapshot(runs=(), devices=())
    shown = io.StringIO()
    Console(width=100, file=shown).print(draw(empty, "http://x"))
    assert "no run yet" in shown.getvalue()
    assert line(empty) == "no run yet"


def test_a_plain_line_says_the_same() -> None:
    """For logs and pipes: one line, no colours."""
    text = line(Tracker().update(parse(page(fp32=True).encode(), "test")))
    assert "\n" not in text
    assert "\x1b" not in text
    for shown in (
        "step 100",
        "loss 3.50",
        "state 32.0 MB (asked for 8.56 MB, fp32 32.0 MB)",
        "NOT STORED AS ASKED",
    ):
        assert shown in text


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (number(None), "–"),
        (number(0.0), "0.00"),
        (number(1.23456), "1.23"),
        (number(123.4), "123"),
        (number(-4e-9), "-4.00e-09"),
        (number(math.nan), "nan"),
        (number(math.inf), "inf"),
        (count(1234567.0), "1,234,567"),
        (count(None), "–"),
        (percent(0.0), "0 %"),
        (percent(0.0123), "1.23 %"),
        (percent(None), "–"),
        (size(None), "–"),
        (size(12), "12 B"),
        (size(999_999), "1.00 MB"),
        (size(2_050_000), "2.05 MB"),
        (size(141e9), "141 GB"),
        (curve(()), ""),
        (curve((1.0,)), ""),
        (curve((0.0, 1.0, math.nan, 0.5)), "▁█▅"),
        (curve((2.0, 2.0)), "▁▁"),
        (str(len(curve(tuple(map(float, range(1000)))))), "22"),
    ],
)
def test_figures(made: str, expected: str) -> None:
    """How numbers are written; absent is a dash, never a zero."""
    assert made == expected
