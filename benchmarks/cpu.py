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
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optwatch
from benchmarks import cpu_cases
from benchmarks.cpu_cases import CASES, Case
from benchmarks.cpu_report import report
from optwatch.kernels.cpu.library import ISA_VARIABLE, LibraryError, library

RESULTS = Path(__file__).parent / "results"
COMMAND = "python -m benchmarks.cpu"
SECONDS = 600  # for one process; compiling torchao's step takes most of a minute
PACKAGES = ("optwatch", "torch", "numpy", "bitsandbytes", "torchao", "pyperf")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").partition("\n")[0])
    names = [case.name for case in CASES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--processes", type=int, default=3, help="for each case and instruction set (3)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: to see that it works, not to measure"
    )
    parser.add_argument("--output", type=Path, help="where to write cpu.json and cpu.md")
    parser.add_argument("--sample", nargs=2, metavar=("CASE", "PROCESS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes {options.processes}: at least 1 is needed")
    if options.sample:
        (case,) = (case for case in CASES if case.name == options.sample[0])
        sizes = cpu_cases.QUICK if options.quick else cpu_cases.FULL
        print(json.dumps(cpu_cases.sample(case, sizes, int(options.sample[1]))))
        return 0
    document = measure(options)
    document = json.loads(written := compact(document))  # the table is made of what the file says
    print(text := report(document))
    whole = not (options.quick or options.only)
    if output := options.output or (RESULTS if whole else None):
        output.mkdir(parents=True, exist_ok=True)
        (output / "cpu.json").write_text(written)
        (output / "cpu.md").write_text(text)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every process of every case and put the results together."""
    isas = instruction_sets()
    cases = [case for case in CASES if options.only is None or case.name in options.only]
    missing = {case.name: reason for case in cases if (reason := why_not(case))}
    rows = [(case, isa) for case in cases for isa in (isas if case.narrow else isas[:1])]
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
        "command": COMMAND + "".join(f" {word}" for word in words(options)),
        "machine": machine(),
        "settings": {"processes": options.processes, "quick": options.quick, "instruction_sets": isas},
        "minutes": round((time.monotonic() - started) / 60, 1),
        "results": [row(case, isa, samples[case.name, isa], reasons[case.name, isa]) for case, isa in rows],
    }


def words(options: argparse.Namespace) -> list[str]:
    """The options that differ from their defaults and bear on the figures."""
    given = ["--quick"] * options.quick + (["--only", *options.only] if options.only else [])
    return given + (["--processes", str(options.processes)] if options.processes != 3 else [])


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
    command = [sys.executable, "-m", "benchmarks.cpu", "--sample", case.name, str(process)]
    try:
        done = subprocess.run(
            command + ["--quick"] * quick,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, ISA_VARIABLE: isa},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {SECONDS} s"
    except subprocess.CalledProcessError as error:
        lines: list[str] = error.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit code {error.returncode}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["isa"] != isa:
        return f"it ran with {found['isa']}"
    return found


def row(case: Case, isa: str, samples: list[dict[str, Any]], reason: str | None) -> dict[str, Any]:
    """What the processes of one case and instruction set give together."""
    facts: dict[str, Any] = {
        "name": case.name,
        "what": case.what,
        "against": case.against,
        "isa": isa,
        "unit": case.unit,
    }
    facts |= {"target": case.target, "more_is_better": case.more_is_better, "problem": reason}
    if not samples:
        return {**facts, "measured": None, "reached": None, "processes": []}
    figures = [sample["figure"] for sample in samples]
    measured = statistics.median(figures)
    reached = None
    if case.target is not None:
        reached = measured >= case.target if case.more_is_better else measured <= case.target
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


def machine() -> dict[str, Any]:
    """What the figures depend on, without naming the machine."""
    import torch

    told: dict[str, Any] = {}
    try:
        import pyperf  # type: ignore[import-untyped]
    except ImportError:
        pass  # it describes the machine a little better; the benchmark's own test does without
    else:
        told = pyperf.Run([1.0], collect_metadata=True).get_metadata()
    kept = ("cpu_model_name", "cpu_config", "cpu_freq", "aslr", "date", "python_version")
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python_version": platform.python_version(),
        **{name: str(told[name]) for name in kept if name in told},
        "versions": {name: found for name in PACKAGES if (found := version(name))},
    }


def version(package: str) -> str | None:
    """The version that is installed, or None."""
    if package == "optwatch":
        return optwatch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def compact(document: dict[str, Any]) -> str:
    """JSON with a line for each list of numbers, and numbers of six digits."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        if isinstance(value, list):
            return [rounded(item) for item in value]
        return float(f"{value:.6g}") if isinstance(value, float) else value

    text = json.dumps(rounded(document), indent=1, ensure_ascii=False)
    return re.sub(r"\[[-+.\de,\s]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


if __name__ == "__main__":
    sys.exit(main())
