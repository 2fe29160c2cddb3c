"""What watching takes of a step: ours around our optimizers and others', and what others do, side by side.

    python -m benchmarks.watch [--only NAME ...] [--processes 3] [--quick] [--output DIRECTORY]

Every case is timed in several processes, which go round in turn (see `benchmarks.watch_cases`); the figure is the
median over them. A whole run is written to ``results/watch.json`` (every sample) and ``results/watch.md``; one with
``--only`` or ``--quick`` is written only where ``--output`` says. Reaching a target or not changes nothing about the
exit code.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import watch_cases
from benchmarks.processes import Benchmark, machine, version
from benchmarks.watch_cases import CASES, EVERY, Case

PACKAGES = ("transformers", "pytorch-optimizer", "wandb")
METHOD = """\
A step of training is that of a GPT-2 of 4.8 million parameters in 76 tensors, forward and backward over 4,096 tokens
and `step()`; the first row is of the optimizer's step alone. *Usual* and *sampled* are microseconds that watching adds
to a step, *on average* those of one sampled step in {every}, and *share* is that of the unwatched step. Clocks lie
around the hooks; around the whole step for W&B, whose hooks are in the model; and of ours also around the step, since
the kernel sums. Median over {processes} processes with the lowest and the highest. Largest load average while
measuring: {load:.1f}.

*Composer* is the arithmetic that the documentation of its OptimizerMonitor lists, in eager torch, and not the package;
*W&B* is `run.watch(model, log="all")` of the package, offline. Both look at one step in {every}, as ours does; their
own defaults are one in 10 and one in 1,000. Neither looks at anything in the other steps, whereas ours has bytes,
norms of gradients, non-finite elements and durations of every step."""
COUNTS = """\
What a watched step does more than an unwatched one, counted: torch's operations, collectives, the bytes of tensors
that are made, and numbers that the host reads from tensors, for each of which it would wait on a GPU. Counted in one
process; under FSDP Composer reduces each of its figures over the ranks besides."""
TIMES_HEAD = (
    "watched by", "optimizer", "its step", "of", "usual", "sampled", "on average", "share", "lowest–highest", "target",
    "reached",
)  # fmt: skip
COUNTS_HEAD = ("watched by", "optimizer", "step", "operations", "collectives", "new memory", "host reads")


def sample(name: str, process: int, quick: bool) -> dict[str, Any]:
    """Time a case in this process."""
    (case,) = (case for case in CASES if case.name == name)
    return watch_cases.sample(case, watch_cases.QUICK if quick else watch_cases.FULL, process)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every process of every case and put the results together."""
    cases = [case for case in CASES if options.only is None or case.name in options.only]
    problems = {
        case.name: f"{case.needs} is not installed"
        for case in cases
        if case.needs and not version(case.needs)
    }
    samples: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases}
    started = time.monotonic()
    for process in range(options.processes):
        for case in cases:
            if case.name in problems:
                continue
            found = BENCHMARK.run(case.name, process, options.quick, OPTWATCH_STORE="off")
            if isinstance(found, str):
                problems[case.name] = found
            else:
                samples[case.name].append(found)
            figure = found if isinstance(found, str) else f"{100 * found['figure']:.3f} %"
            print(
                f"{(time.monotonic() - started) / 60:5.1f} min, {process + 1}: {case.name}: {figure}",
                file=sys.stderr,
            )
    return {
        "command": BENCHMARK.command_of(options),
        "machine": machine(*PACKAGES),
        "settings": {"processes": options.processes, "quick": options.quick, "every": EVERY},
        "minutes": round((time.monotonic() - started) / 60, 1),
        "results": [row(case, samples[case.name], problems.get(case.name)) for case in cases],
    }


def row(case: Case, samples: list[dict[str, Any]], problem: str | None) -> dict[str, Any]:
    """What the processes of one case give together."""
    facts: dict[str, Any] = {
        "name": case.name, "what": case.what, "by": case.by, "of": case.of, "target": case.target, "problem": problem,
    }  # fmt: skip
    if not samples:
        return {**facts, "measured": None, "reached": None, "processes": []}
    figures = [sample["figure"] for sample in samples]
    measured = statistics.median(figures)
    medians = {
        name: statistics.median(sample[name] for sample in samples)
        for name in ("usual_us", "sampled_us", "average_us", "step_us", "whole_us")
    }
    return {
        **facts,
        "measured": measured,
        "lowest": min(figures),
        "highest": max(figures),
        "reached": None if case.target is None else measured <= case.target,
        **medians,
        "counts": samples[0]["counts"],
        "processes": samples,
    }


# --- the page -------------------------------------------------------------------------------------------------------

BY = {"optwatch": "optwatch", "composer": "Composer", "wandb": "W&B"}


def report(document: dict[str, Any]) -> str:
    """The result document as a page: where and how it was measured, the times, and what was counted."""
    told, settings = document["machine"], document["settings"]
    loads = [sample["load_average"] for row in document["results"] for sample in row["processes"]]
    versions = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    where = (
        f"{told.get('cpu_model_name', told['processor'])}, {told['cores']} cores, {told['threads']} threads"
    )
    how = METHOD.format(
        every=settings["every"], processes=settings["processes"], load=max(loads, default=0.0)
    )
    lines = ["# Watching", "", f"    {document['command']}", ""]
    lines += [f"{where}; Python {told['python_version']}, {versions}.", "", how]
    if settings["quick"]:
        lines += ["", "**Few steps: these figures show that it works, and nothing else.**"]
    lines += ["", *head(TIMES_HEAD), *(times(row) for row in document["results"])]
    lines += ["", COUNTS, "", *head(COUNTS_HEAD)]
    lines += [counts(row, kind) for row in document["results"] for kind in row.get("counts", ())]
    problems = [f"- {row['name']}: {row['problem']}" for row in document["results"] if row["problem"]]
    return "\n".join([*lines, *([""] if problems else []), *problems, ""])


def head(columns: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]


def times(row: dict[str, Any]) -> str:
    """A row of the first table."""
    start = f"| {BY[row['by']]} | {row['what']} |"
    target = "" if row["target"] is None else f"≤ {100 * row['target']:g} %"
    if row["measured"] is None:
        return f"{start} | | | | | not measured | | {target} | |"
    reached = {True: "yes", False: "no", None: ""}[row["reached"]]
    return (
        f"{start} {row['step_us'] / 1e3:.3g} ms | {row['whole_us'] / 1e3:.3g} ms | {row['usual_us']:.0f} µs |"
        f" {row['sampled_us']:.0f} µs | {row['average_us']:.0f} µs | {100 * row['measured']:.3g} % |"
        f" {100 * row['lowest']:.3g}–{100 * row['highest']:.3g} % | {target} | {reached} |"
    )


def counts(row: dict[str, Any], kind: str) -> str:
    """A row of the second table."""
    found = row["counts"][kind]
    return (
        f"| {BY[row['by']]} | {row['what']} | {kind} | {found['operations']:,} | {found['collectives']} |"
        f" {found['new_bytes'] / 1e6:.3g} MB | {found['reads']:,} |"
    )


BENCHMARK = Benchmark(
    name="watch",
    about=(__doc__ or "").partition("\n")[0],
    cases=[case.name for case in CASES],
    sample=sample,
    measure=measure,
    report=report,
    seconds=900,  # compiling torchao's step takes most of a minute
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
