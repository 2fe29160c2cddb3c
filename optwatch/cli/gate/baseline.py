"""What a run cost in numbers, and the file that they are kept in.

A value's name is ``quantity/optimizer/slot/…``, so a tolerance can be given for a quantity or for a part of it:

====================================  =============================================================================
``state_bytes/AdamW/exp_avg/int8``    bytes of a slot in a storage type, for each parameter; the largest rank's
``quantization_error/AdamW/exp_avg``  error of the stored slot, of the worst group and rank
``update_error/AdamW``                error of the update from storing the state, of the worst group and rank
``peak_memory/device``, ``…/host``    largest allocation of torch on a GPU, largest resident memory; the largest rank's
``overhead``                          time that watching took, of the time of all steps
====================================  =============================================================================
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

import optwatch
from optwatch.cli.scrape import Page

VERSION = 1

#: How much worse a value may be, as a part of the baseline's. Bytes are exact; the room is for a few tensors more.
TOLERANCES: Mapping[str, float] = {
    "state_bytes": 0.001,
    "quantization_error": 0.25,
    "update_error": 0.25,
    "peak_memory": 0.05,
    "overhead": 2.0,
}


class GateError(click.ClickException):
    """Nothing could be compared; not the same as a comparison that failed, which is exit code 1."""

    exit_code = 2


@dataclass(frozen=True)
class Baseline:
    """The values of a recorded run, and how far a later one may leave them."""

    run_id: str
    values: Mapping[str, float]
    tolerances: Mapping[str, float] = field(default_factory=lambda: dict(TOLERANCES))

    def tolerance(self, name: str) -> float:
        """The tolerance of a value: the one given for the longest part of its name."""
        parts = name.split("/")
        for length in range(len(parts), 0, -1):
            found = self.tolerances.get("/".join(parts[:length]))
            if found is not None:
                return found
        return TOLERANCES.get(parts[0], 0.0)

    @classmethod
    def of(cls, page: Page, run_id: str) -> Baseline:
        """Take the values of a run. Raises GateError if it has not taken a step."""
        return cls(run_id, measure(page, run_id))

    @classmethod
    def load(cls, path: Path) -> Baseline:
        """Read a file that `save` wrote, and perhaps a person edited. Raises GateError."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise GateError(f"{path}: cannot be read: {(error.strerror or 'error').lower()}") from error
        except ValueError as error:
            raise GateError(f"{path} is not JSON: {error}") from error
        if not isinstance(document, dict) or document.get("version") != VERSION:
            raise GateError(
                f"{path} is not a baseline of version {VERSION}; write one with `optwatch baseline record`"
            )
        run = document.get("run")
        return cls(
            str(run.get("run_id", "")) if isinstance(run, dict) else "",
            _numbers(path, document, "values"),
            _numbers(path, document, "tolerances"),
        )

    def save(self, path: Path) -> None:
        """Write the file. Tolerances of a baseline that it replaces are kept: a person may have set them."""
        tolerances = Baseline.load(path).tolerances if path.exists() else self.tolerances
        document = {
            "version": VERSION,
            "run": {
                "run_id": self.run_id,
                "recorded": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "optwatch": optwatch.__version__,
            },
            "tolerances": dict(tolerances),
            "values": dict(self.values),
        }
        try:
            path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise GateError(f"{path}: cannot be written: {(error.strerror or 'error').lower()}") from error


def measure(page: Page, run_id: str) -> dict[str, float]:
    """The values of a run by name. Raises GateError if it has not taken a step."""
    values = {**_state(page, run_id), **_errors(page, run_id), **_memory(page, run_id)}
    if not values.keys() - {"peak_memory/host", "peak_memory/device"}:
        raise GateError(
            f"run {run_id!r} has no optimizer state: it has taken no step, or its optimizer keeps none"
        )
    spent = page.total("optwatch.overhead", run_id=run_id)
    seconds = page.total("optwatch.step_duration#sum", run_id=run_id)
    if spent is not None and seconds:
        values["overhead"] = spent / seconds
    return values


def _state(page: Page, run_id: str) -> dict[str, float]:
    """Bytes for each parameter by slot and storage type. Step counters are left out: they are counted by tensor."""
    values: dict[str, float] = {}
    bytes_of: dict[tuple[str, str], float] = {}  # of a rank
    for labels, size in page.select("optwatch.optimizer.state", run_id=run_id):
        if labels["slot"] != "step" and size:
            name = f"state_bytes/{labels['optimizer']}/{labels['slot']}/{labels['dtype']}"
            bytes_of[labels["rank"], name] = bytes_of.get((labels["rank"], name), 0.0) + size
    for (rank, name), size in sorted(bytes_of.items()):
        optimizer = name.split("/")[1]
        parameters = page.total("optwatch.parameters", run_id=run_id, rank=rank, optimizer=optimizer)
        if parameters:
            _keep_largest(values, name, size / parameters)
    return values


def _errors(page: Page, run_id: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for labels, value in page.select("optwatch.quantization_error.ratio", run_id=run_id):
        _keep_largest(values, f"quantization_error/{labels['optimizer']}/{labels['slot']}", value)
    for labels, value in page.select("optwatch.update_quantization_error.ratio", run_id=run_id):
        _keep_largest(values, f"update_error/{labels['optimizer']}", value)
    return dict(sorted(values.items()))


def _memory(page: Page, run_id: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for place, metric in (("device", "allocator.allocated_peak"), ("host", "host_memory.peak")):
        for _, value in page.select(f"optwatch.{metric}", run_id=run_id):
            _keep_largest(values, f"peak_memory/{place}", value)
    return values


def _keep_largest(values: dict[str, float], name: str, value: float) -> None:
    """NaN counts as larger than anything: it has to show."""
    if name not in values or value > values[name] or math.isnan(value):
        values[name] = value


def parse_tolerances(given: Iterable[str]) -> dict[str, float]:
    """``NAME=VALUE`` of the command line. Raises GateError."""
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name.split("/")[0] not in TOLERANCES or not number >= 0:
            raise GateError(
                f"--tolerance {text!r}: expected NAME=VALUE with a value of at least 0 and a name that begins with one "
                f"of {', '.join(TOLERANCES)}"
            )
        found[name] = number
    return found


def _numbers(path: Path, document: Mapping[str, Any], part: str) -> dict[str, float]:
    """A part of the file that maps names to numbers."""
    found = document.get(part)
    if not isinstance(found, dict) or (part == "values" and not found):
        raise GateError(f"{path}: {part!r} should map names to numbers, found {found!r}")
    for name, value in found.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise GateError(f"{path}: {part} {name!r} is {value!r}, expected a number")
        if name.split("/")[0] not in TOLERANCES:
            raise GateError(f"{path}: {part} {name!r} is about nothing known ({', '.join(TOLERANCES)})")
        if part == "tolerances" and not value >= 0:
            raise GateError(f"{path}: the tolerance of {name!r} is {value!r}, expected at least 0")
    return {name: float(value) for name, value in found.items()}
