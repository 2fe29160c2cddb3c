"""From a metrics page to what the view shows."""

import math

import pytest

from cli.pages import OPTIMIZER, PARAMETERS, RUN, page, sample
from optwatch.cli.scrape import ScrapeError, parse
from optwatch.cli.snapshot import RunView, Tracker


def runs_of(*pages: str) -> tuple[RunView, ...]:
    tracker = Tracker()
    for text in pages:
        snapshot = tracker.update(parse(text.encode(), "test"))
    return snapshot.runs


def test_bytes_are_those_of_the_page() -> None:
    """Found, asked-for and fp32 bytes, per slot and together."""
    (run,) = runs_of(page())
    assert [slot.slot for slot in run.slots] == ["exp_avg", "exp_avg_sq"]
    assert run.slots[0].actual_bytes == PARAMETERS + 3 * PARAMETERS // 64
    assert run.slots[0].dtypes == ("int8", "float32", "bfloat16")
    assert run.fp32_bytes == 2 * 4 * PARAMETERS
    assert run.as_expected
    assert run.actual_bytes == run.expected_bytes


def test_promoted_state_is_not_as_expected() -> None:
    """An fp32 resume: the bytes found leave the bytes asked for."""
    (run,) = runs_of(page(), page(step=101, fp32=True))
    assert not run.as_expected
    assert run.actual_bytes == run.fp32_bytes
    assert run.slots[0].dtypes == ("float32",)
    assert run.expected_bytes is not None
    assert run.expected_bytes < run.actual_bytes


def test_rates_are_those_between_scrapes() -> None:
    """The first page gives the mean of the run, later ones what happened since; both by the run's own clock."""
    first = page(step=100, seconds=20.0)
    assert runs_of(first)[0].steps_per_second == pytest.approx(5.0)
    (run,) = runs_of(first, page(step=150, seconds=22.0))
    assert run.steps_per_second == pytest.approx(25.0)
    assert run.overhead_ratio == pytest.approx(1e-3)


def test_a_run_that_stands_still_has_no_rate() -> None:
    """Two equal pages: no steps, hence no rate, which is not a rate of zero and not the old one."""
    assert runs_of(page(), page())[0].steps_per_second is None


def test_absent_is_not_zero() -> None:
    """A page with nothing but a rank: everything else is unknown."""
    (run,) = runs_of(sample("optwatch.rank_up", 1, **RUN) + "\n")
    assert (run.step, run.loss, run.steps_per_second, run.overhead_ratio, run.host_bytes) == (None,) * 5
    assert run.slots == ()
    assert run.update_error is None


def test_nan_is_shown_and_not_filtered() -> None:
    """The worst group is the one whose error is NaN."""
    (run,) = runs_of(page().replace("} 0.02\n", "} NaN\n"))
    assert run.update_error is not None
    assert math.isnan(run.update_error)


def test_ranks_are_merged() -> None:
    """Bytes add up over ranks, ratios are the largest, the rate is that of one rank; norms are those of the whole."""
    second = page(step=90).replace('rank="0"', 'rank="1"').replace("} 0.03\n", "} 0.5\n")
    (run,) = runs_of(page() + second)
    assert (run.ranks, run.ranks_up) == (2, 2)
    assert run.actual_bytes == 2 * runs_of(page())[0].actual_bytes
    assert run.step == 100
    assert run.update_error == 0.5
    assert run.steps_per_second == pytest.approx(4.75)
    sharded = run.groups[0].gradient_norm
    assert sharded == pytest.approx(0.5 * math.sqrt(2))
    copies = [sample("optwatch.replicas", 2, **{**OPTIMIZER, "rank": rank}) for rank in "01"]
    (run,) = runs_of("\n".join([page() + second.strip(), *copies, ""]))
    assert run.groups[0].gradient_norm == pytest.approx(0.5)


def test_the_newest_living_run_comes_first() -> None:
    """A dead run that the agent still serves does not hide the living one."""
    dead = page().replace(RUN["run_id"], "a-dead-run").replace("optwatch_rank_up{", "optwatch_rank_up{", 1)
    dead = dead.replace('rank="0"} 1\n', 'rank="0"} 0\n', 1)
    assert [run.run_id for run in runs_of(dead + page())] == [RUN["run_id"], "a-dead-run"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html><body>hello</body></html>", "not a metrics page"),
        (b"\xff\xfe\x00", "not a metrics page"),
        (b"up{ 1\n", "not a metrics page"),
        (b"", "not of an optwatch agent"),
        (b"# TYPE up gauge\nup 1\n", "not of an optwatch agent"),
    ],
)
def test_what_is_no_agents_page_is_refused(body: bytes, message: str) -> None:
    """The error names the address and what was expected."""
    with pytest.raises(ScrapeError, match=message) as caught:
        parse(body, "http://127.0.0.1:1/metrics")
    assert caught.value.format_message().startswith("http://127.0.0.1:1/metrics ")
