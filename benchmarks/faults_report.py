"""What `benchmarks.faults` has measured, its figures and its page."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import dataclass, field

import torch

#: Of sixteen faults that cost nothing one is beyond three by chance in some runs of a hundred, beyond four hardly ever.
DEVIATIONS = 4


@dataclass(frozen=True)
class Times:
    """Of each step of one run, in milliseconds."""

    ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)  # of the thread that trains

    def median(self, what: str = "ms") -> float:
        """Of the steps."""
        return float(statistics.median(getattr(self, what)))


@dataclass(frozen=True)
class Round:
    """The times of the four runs, and the agents' part of the processor."""

    unwatched: Times
    healthy: Times
    again: Times
    troubled: Times
    agents_percent: float

    def ratio(self, one: str, other: str, what: str = "ms") -> float:
        """Of median steps."""
        return float(getattr(self, one).median(what) / getattr(self, other).median(what))


def summary(done: list[Round]) -> dict[str, float]:
    """The figures of one fault."""
    cost = sorted(one.ratio("troubled", "healthy") for one in done)

    def middle(one: str, other: str, what: str) -> float:
        return statistics.median(found.ratio(one, other, what) for found in done)

    def slow(name: str) -> float:
        values = [ms for one in done for ms in getattr(one, name).ms]
        return float(statistics.quantiles(values, n=100)[-1])

    return {
        "unwatched_ms": statistics.median(one.unwatched.median() for one in done),
        "healthy": middle("healthy", "unwatched", "ms"),
        "noise": middle("again", "healthy", "ms"),
        "cost": statistics.median(cost),
        "cost_lowest": cost[0],
        "cost_highest": cost[-1],
        "cpu_noise": middle("again", "healthy", "cpu_ms"),
        "cpu_cost": middle("troubled", "healthy", "cpu_ms"),
        "p99_ms": slow("troubled"),
        "p99_healthy_ms": slow("healthy"),
        "agents_percent": statistics.median(one.agents_percent for one in done),
    }


def band(found: dict[str, dict[str, float]], noise: str) -> tuple[float, float]:
    """Mean of the noise less and plus `DEVIATIONS` of its standard deviations."""
    values = [row[noise] for row in found.values()]
    middle, wide = statistics.mean(values), DEVIATIONS * statistics.stdev(values)
    return middle - wide, middle + wide


def report(found: dict[str, dict[str, float]], missing: list[str], steps: int, rounds: int) -> str:
    """The page faults.md."""
    low, high = band(found, "noise")
    cpu_low, cpu_high = band(found, "cpu_noise")
    machine = (
        f"{torch.get_num_threads()} thread, {platform.machine()}, torch {torch.__version__}, "
        f"load average {os.getloadavg()[0]:.1f} by this and other work"
    )
    head = f"""\
# Steps of training while the monitor is in trouble

{rounds} rounds of {steps} steps of each of four runs in turn; {machine}.
Weights and state of all four are bit-equal after every round.

    python -m benchmarks faults

Ratios are of median steps, and the median over the rounds. The noise: beside each fault a second healthy run is
measured against the first in the same way. The mean of these figures, with {DEVIATIONS} of their standard deviations
to both sides, is {low:.3f} to {high:.3f} for the time and {cpu_low:.3f} to {cpu_high:.3f} for the CPU time of
the thread that trains. A fault is within the noise up to the larger of these, and marked (!) beyond.

| what happened | unwatched step | healthy / unwatched | under the fault / healthy | of the rounds | CPU time | \
slowest 1 %, healthy | agents, of a core |
|---|---|---|---|---|---|---|---|"""
    lines = [head]
    for name, row in found.items():
        mark = "" if row["cost"] <= high else " (!)"
        cpu_mark = "" if row["cpu_cost"] <= cpu_high else " (!)"
        lines.append(
            f"| {name} | {row['unwatched_ms']:.2f} ms | {row['healthy']:.3f} | {row['cost']:.3f}{mark} "
            f"| {row['cost_lowest']:.3f}–{row['cost_highest']:.3f} | {row['cpu_cost']:.3f}{cpu_mark} "
            f"| {row['p99_ms']:.1f}, {row['p99_healthy_ms']:.1f} ms | {row['agents_percent']:.1f} % |"
        )
    if missing:
        lines.append(f"\nNot measured, for want of a privilege: {', '.join(missing)}.")
    return "\n".join([*lines, ""])
