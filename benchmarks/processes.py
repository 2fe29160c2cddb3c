"""Benchmarks whose cases are timed in processes of their own: the command line, a process, and what is written."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optwatch

RESULTS = Path(__file__).parent / "results"
PROCESSES = 3  # for each case, unless the command says otherwise
PACKAGES = ("optwatch", "torch", "numpy", "bitsandbytes", "torchao", "pyperf")

Document = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """One of them; its result is ``results/NAME.json`` with every sample, and ``NAME.md``."""

    name: str  # of the module
    about: str
    cases: Sequence[str]
    sample: Callable[
        [str, int, bool], Document
    ]  # times a case, by name, in the n-th process; True for tiny sizes
    measure: Callable[[argparse.Namespace], Document]
    report: Callable[[Document], str]
    seconds: float  # that a process may take

    @property
    def command(self) -> str:
        """What starts it."""
        return f"python -m benchmarks.{self.name}"

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Measure, write, print. Only a whole run is written where nothing says where."""
        options = self._options(arguments)
        if options.sample:
            print(json.dumps(self.sample(options.sample[0], int(options.sample[1]), options.quick)))
            return 0
        document = json.loads(
            written := compact(self.measure(options))
        )  # the table is made of what the file says
        print(text := self.report(document))
        whole = not (options.quick or options.only)
        if output := options.output or (RESULTS if whole else None):
            output.mkdir(parents=True, exist_ok=True)
            (output / f"{self.name}.json").write_text(written)
            (output / f"{self.name}.md").write_text(text)
        return 0

    def _options(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(prog=self.command, description=self.about)
        parser.add_argument(
            "--only", nargs="+", choices=self.cases, metavar="NAME", help=f"of {', '.join(self.cases)}"
        )
        parser.add_argument("--processes", type=int, default=PROCESSES, help=f"for each case ({PROCESSES})")
        parser.add_argument(
            "--quick", action="store_true", help="tiny sizes: to see that it works, not to measure"
        )
        parser.add_argument("--output", type=Path, help=f"where to write {self.name}.json and {self.name}.md")
        parser.add_argument("--sample", nargs=2, metavar=("CASE", "PROCESS"), help=argparse.SUPPRESS)
        options = parser.parse_args(arguments)
        if options.processes < 1:
            parser.error(f"--processes {options.processes}: at least 1 is needed")
        return options

    def command_of(self, options: argparse.Namespace) -> str:
        """The command with those options that bear on the figures."""
        given = ["--quick"] * options.quick + (["--only", *options.only] if options.only else [])
        given += ["--processes", str(options.processes)] if options.processes != PROCESSES else []
        return " ".join([self.command, *given])

    def run(self, case: str, process: int, quick: bool, **environment: str) -> Document | str:
        """One process; its samples, or the reason why there are none."""
        module = f"benchmarks.{self.name}"
        command = [sys.executable, "-W", "ignore", "-m", module, "--sample", case, str(process)]
        try:
            done = subprocess.run(
                command + ["--quick"] * quick,
                cwd=Path(__file__).parent.parent,
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                timeout=self.seconds,
                check=True,
            )
        except subprocess.TimeoutExpired:
            return f"it took longer than {self.seconds:.0f} s"
        except subprocess.CalledProcessError as error:
            lines: list[str] = error.stderr.strip().splitlines()
            return lines[-1] if lines else f"exit code {error.returncode}"
        found: Document = json.loads(done.stdout.splitlines()[-1])
        return found


def machine(*packages: str) -> Document:
    """What the figures depend on, without naming the machine; ``packages`` are those beyond the usual ones."""
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
        "versions": {name: found for name in (*PACKAGES, *packages) if (found := version(name))},
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
