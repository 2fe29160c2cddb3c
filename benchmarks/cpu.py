"""The speed of steps on the CPU, and what watching adds to them.

    python -m benchmarks.cpu [--only NAME ...] [--processes 3] [--quick] [--output DIRECTORY]

Every case is timed as a pair in one process (see `benchmarks.cpu_cases`), in several processes one after another, once
with the best instruction set and, the main cases, once with ours held to AVX2 (torch keeps its best). The figure is the
median over the processes: torch's own fused step settles at one speed or another when a process starts, and stays
there. The cases go round in turn, so that the processes of one case lie minutes apart.

A whole run is written to ``results/cpu.json`` (every sample) and ``results/cpu.md``; one with ``--only`` or ``--quick``
is written only where ``--output`` says. Reaching a target or not changes nothing about the exit code.

pyperf tells about the machine, but does not drive: its runner gives every benchmark processes of its own and times one
function in them, and what counts here is the ratio of two that take turns in the same process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import Any

from benchmarks import cpu_cases
from benchmarks.cpu_cases import CASES, Case
from benchmarks.cpu_report import report
from benchmarks.processes import Benchmark, machine, version
from optwatch.kernels.cpu.library import ISA_VARIABLE, LibraryError, library


def sample(name: str, process: int, quick: bool) -> dict[str, Any]:
    """Time a case in this process."""
    (case,) = (case for case in CASES if case.name == name)
    return cpu_cases.sample(case, cpu_cases.QUICK if quick else cpu_cases.FULL, process)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every process of every case and put the results together."""
    isas = instruction_sets()
    cases = [case for case in CASES if options.only is None or case.name in options.only]
    missing = {case.name: reason for case in cases if (reason := why_not(case))}
    rows = [(case, isa) for case in cases for isa in (isas if case.twice else isas[:1])]
    samples: dict[tuple[str, str], list[dict[str, Any]]] = {(case.name, isa): [] for case, isa in rows}
    failed: dict[tuple[str, str], str] = {}
    started = time.monotonic()
    for process in range(options.processes):
        for case, isa in rows:
            if case.name in missing:
                continue
            found = run(case, isa, process, options.quick)
            if isinstance(found, str):
                failed[case.name, isa] = found
            else:
                samples[case.name, isa].append(found)
            minutes = (time.monotonic() - started) / 60
            figure = found if isinstance(found, str) else f"{found['figure']:.4g} {case.unit}"
            print(f"{minutes:5.1f} min, {process + 1} of {options.processes}: {case.name}, {isa}: {figure}",
                  file=sys.stderr)  # fmt: skip
    reasons = {(case.name, isa): missing.get(case.name) or failed.get((case.name, isa)) for case, isa in rows}
    return {
        "command": BENCHMARK.command_of(options),
        "machine": machine(),
        "settings": {"processes": options.processes, "quick": options.quick, "instruction_sets": isas},
        "minutes": round((time.monotonic() - started) / 60, 1),
        "results": [row(case, isa, samples[case.name, isa], reasons[case.name, isa]) for case, isa in rows],
    }


def instruction_sets() -> list[str]:
    """The best one, and AVX2 where that is another; a set forced from outside is the only one."""
    loaded = library()
    if isinstance(loaded, LibraryError):
        raise SystemExit(f"there is nothing to measure: {loaded}")
    if os.environ.get(ISA_VARIABLE):
        return [loaded.isa]
    return [loaded.isa, *(["avx2"] if "avx2" in loaded.isas and loaded.isa != "avx2" else [])]


def why_not(case: Case) -> str | None:
    """The reason why a case cannot be measured here."""
    if case.needs is None or version(case.needs):
        return None
    return f"{case.needs} is not installed (it is in the extra 'bench')"


def run(case: Case, isa: str, process: int, quick: bool) -> dict[str, Any] | str:
    """One process; its samples, or the reason why there are none."""
    found = BENCHMARK.run(case.name, process, quick, **{ISA_VARIABLE: isa})
    return f"it ran with {found['isa']}" if isinstance(found, dict) and found["isa"] != isa else found


def row(case: Case, isa: str, samples: list[dict[str, Any]], reason: str | None) -> dict[str, Any]:
    """What the processes of one case and instruction set give together."""
    facts: dict[str, Any] = {
        "name": case.name,
        "what": case.what,
        "against": case.against,
        "isa": isa,
        "unit": case.unit,
    }
    target = case.target_with(isa)
    facts |= {"target": target, "more_is_better": case.more_is_better, "problem": reason}
    if not samples:
        return {**facts, "measured": None, "reached": None, "processes": []}
    figures = [sample["figure"] for sample in samples]
    measured = statistics.median(figures)
    reached = None
    if target is not None:
        reached = measured >= target if case.more_is_better else measured <= target
    return {
        **facts,
        "measured": measured,
        "lowest": min(figures),
        "highest": max(figures),
        "reached": reached,
        "ours_ms": 1e3 * statistics.median(statistics.median(sample["ours"]) for sample in samples),
        "other_ms": 1e3 * statistics.median(statistics.median(sample["other"]) for sample in samples),
        "processes": samples,
    }


BENCHMARK = Benchmark(
    name="cpu",
    about=(__doc__ or "").partition("\n")[0],
    cases=[case.name for case in CASES],
    sample=sample,
    measure=measure,
    report=report,
    seconds=600,  # compiling torchao's step takes most of a minute
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
