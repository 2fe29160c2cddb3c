"""Expressions over the catalogue: a metric that is not in it, or is renamed, fails here and not on the wall.

Over ranks a query takes the largest value of a ratio or a norm; bytes and counts add up.
"""

from __future__ import annotations

from dashboards.panels import Query, Steps
from deploy.prometheus.recordings import RECORDINGS
from optwatch.metrics.catalogue import CATALOGUE

#: What is chosen above the panels. "All" ranks is the default: the panels aggregate over what is chosen.
THIS_RUN, CHOSEN_RUNS = 'run_id="$run"', 'run_id=~"$run"'
ANY_JOB = 'job=~"$job"'
RUN = f'{THIS_RUN}, rank=~"$rank"'
OPTIMIZER = f'{RUN}, optimizer=~"$optimizer"'
GROUP = f'{OPTIMIZER}, group=~"$group"'


def series(name: str, matchers: str = "", suffix: str = "") -> str:
    """Return a selector for the metric with the OpenTelemetry name ``optwatch.<name>``."""
    full = CATALOGUE[f"optwatch.{name}"].prometheus + suffix
    return f"{full}{{{matchers}}}" if matchers else full


def recorded(name: str, matchers: str) -> str:
    """Return a selector for a series that a recording rule makes."""
    assert any(rule.record == name for rule in RECORDINGS), f"no rule records {name}"
    return f"{name}{{{matchers}}}"


def worst(name: str, *by: str, matchers: str = GROUP) -> Query:
    """The largest over ranks of a ratio, norm or moment, for each of the labels `by`."""
    return Query(
        f"max by ({', '.join(by)}) ({series(name, matchers)})", " ".join(f"{{{{{label}}}}}" for label in by)
    )


def total(name: str, *by: str, matchers: str = OPTIMIZER, legend: str = "") -> Query:
    """The sum over ranks of bytes or counts."""
    labels = f" by ({', '.join(by)})" if by else ""
    return Query(
        f"sum{labels} ({series(name, matchers)})", legend or " ".join(f"{{{{{label}}}}}" for label in by)
    )


def node(name: str, *, rate: bool = False, matchers: str = RUN) -> str:
    """The series of a metric that belongs to no run, from the agents that serve the chosen ranks."""
    full = f"rate({series(name)}[$__rate_interval])" if rate else series(name)
    return f"{full} and on (instance) {series('rank_up', matchers)}"


def devices(name: str, legend: str = "{{gpu}}", *, rate: bool = False, matchers: str = RUN) -> Query:
    """A metric of the GPUs of the nodes that the chosen ranks run on."""
    return Query(node(name, rate=rate, matchers=matchers), legend)


def latest(name: str, legend: str, matchers: str = RUN) -> Query:
    """The series as they are."""
    return Query(series(name, matchers), legend)


def rate(name: str, *by: str, matchers: str = RUN, legend: str = "") -> Query:
    """The growth a second of a counter, over all ranks."""
    labels = f" by ({', '.join(by)})" if by else ""
    expr = f"sum{labels} (rate({series(name, matchers)}[$__rate_interval]))"
    return Query(expr, legend or " ".join(f"{{{{{label}}}}}" for label in by))


def growth(name: str, matchers: str, legend: str) -> Query:
    """By how much a counter grew in the time shown."""
    return Query(f"sum (increase({series(name, matchers)}[$__range]))", legend)


def quantiles(name: str, matchers: str) -> tuple[Query, ...]:
    """Median and tail of a histogram, over all ranks."""
    buckets = f"sum by (le) (rate({series(name, matchers, '_bucket')}[$__rate_interval]))"
    return tuple(Query(f"histogram_quantile({q}, {buckets})", f"p{q * 100:g}") for q in (0.5, 0.95, 0.99))


def mean(name: str, matchers: str, by: str) -> str:
    """The expression for the mean of a histogram, for each value of the label `by`."""
    total = f"sum by ({by}) (rate({series(name, matchers, '_sum')}[$__rate_interval]))"
    return f"{total} / sum by ({by}) (rate({series(name, matchers, '_count')}[$__rate_interval]))"


GREEN_ABOVE_ZERO_RED: Steps = (("green", None), ("red", 1e-9))
ERROR: Steps = (("green", None), ("orange", 0.1), ("red", 0.25))
