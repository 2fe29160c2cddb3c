"""What a board holds: an immutable description, written once per generation as JSON.

Values live in the records and in the live header; names, labels and tensors live here, so that a step writes
numbers only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from optwatch.board.directory import board_name
from optwatch.board.errors import BoardSchemaError
from optwatch.metrics.fields import CHEAP_FIELDS, SLOT_FIELDS, STEP, TENSOR_FIELDS

CHEAP_WIDTH = len(CHEAP_FIELDS)


@dataclass(frozen=True)
class Series:
    """One gauge, counter or info: the metric's name as in the catalogue and its own labels.

    ``run_id`` and ``rank`` are added by the agent from ``Schema.run`` and need not be given.
    """

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """The identity of the series: its name and its labels in order."""
        return self.name, tuple(sorted(self.labels.items()))


@dataclass(frozen=True)
class HistogramSeries(Series):
    """A histogram with upper bucket bounds in the metric's unit, ascending, without +Inf."""

    bounds: tuple[float, ...] = ()


@dataclass(frozen=True)
class TensorInfo:
    """One row of a table: a tensor, or a group of them after folding."""

    name: str
    group: str
    numel: int


@dataclass(frozen=True)
class Table:
    """The statistics of one optimizer: one row of float64 fields per tensor.

    ``second_moments[i]`` tells whether slot i holds squares, whose errors are taken on square roots.
    ``replicas`` is the number of ranks that hold the same rows: sums over ranks are divided by it.
    ``family`` says where the rows come from, and with it which metrics of the catalogue are formed of them; their
    series carry ``labels`` besides. Fields that this source cannot sum are ``absent``: their columns mean nothing.
    Those of the cheap ones that only full rows hold are ``sampled``.
    """

    optimizer: str
    slots: tuple[str, ...]
    second_moments: tuple[bool, ...]
    tensors: tuple[TensorInfo, ...]
    replicas: int = 1
    family: str = STEP
    labels: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    sampled: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, tuple[tuple[str, str], ...]]:
        """The identity of the table."""
        return self.optimizer, self.family, tuple(sorted(self.labels.items()))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the columns: the tensor's fields, then ``slot.field`` for each slot."""
        return (*TENSOR_FIELDS, *(f"{slot}.{name}" for slot in self.slots for name in SLOT_FIELDS))

    @property
    def width(self) -> int:
        """Number of columns of a full row."""
        return len(TENSOR_FIELDS) + len(SLOT_FIELDS) * len(self.slots)


@dataclass(frozen=True)
class Schema:
    """One generation of a board.

    ``run`` describes the process (run_id, rank, world_size, local_rank, host, job, pid, start_time, …) in JSON
    values; ``run_id`` and ``rank`` are required.
    """

    run: Mapping[str, Any]
    gauges: tuple[Series, ...] = ()
    counters: tuple[Series, ...] = ()
    infos: tuple[Series, ...] = ()
    histograms: tuple[HistogramSeries, ...] = ()
    tables: tuple[Table, ...] = ()

    def __post_init__(self) -> None:
        _validate(self)

    def to_json(self) -> bytes:
        """Compact JSON, ASCII."""
        series = {
            kind: [[s.name, dict(s.labels)] for s in getattr(self, kind)]
            for kind in ("gauges", "counters", "infos")
        }
        document = {
            "run": dict(self.run),
            **series,
            "histograms": [[h.name, dict(h.labels), list(h.bounds)] for h in self.histograms],
            "tables": [
                {
                    "optimizer": t.optimizer,
                    "slots": list(t.slots),
                    "second_moments": list(t.second_moments),
                    "fields": list(t.fields),
                    "replicas": t.replicas,
                    "family": t.family,
                    "labels": dict(t.labels),
                    "absent": list(t.absent),
                    "sampled": list(t.sampled),
                    "tensors": [[i.name, i.group, i.numel] for i in t.tensors],
                }
                for t in self.tables
            ],
        }
        return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")

    @classmethod
    def from_json(cls, data: bytes) -> Schema:
        """Parse and check. Raises BoardSchemaError, and nothing else, on any input."""
        try:
            document = json.loads(data)
            schema = cls(
                run=_mapping(document["run"]),
                gauges=_series(document["gauges"]),
                counters=_series(document["counters"]),
                infos=_series(document["infos"]),
                histograms=tuple(
                    HistogramSeries(name, _labels(labels), tuple(float(b) for b in bounds))
                    for name, labels, bounds in document["histograms"]
                ),
                tables=tuple(_table(t) for t in document["tables"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
            raise BoardSchemaError(f"the schema's JSON does not describe a board: {error!r}") from error
        return schema


def _series(rows: Sequence[Any]) -> tuple[Series, ...]:
    return tuple(Series(name, _labels(labels)) for name, labels in rows)


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"an object was expected, got {type(value).__name__}")
    return value


def _labels(value: object) -> dict[str, str]:
    labels = _mapping(value)
    if not all(isinstance(v, str) for v in labels.values()):
        raise TypeError("labels must be strings")
    return labels


def _table(row: Mapping[str, Any]) -> Table:
    table = Table(
        optimizer=row["optimizer"],
        slots=tuple(row["slots"]),
        second_moments=tuple(bool(s) for s in row["second_moments"]),
        tensors=tuple(TensorInfo(name, group, int(numel)) for name, group, numel in row["tensors"]),
        replicas=int(row["replicas"]),
        family=str(row["family"]),
        labels=_labels(row["labels"]),
        absent=tuple(row["absent"]),
        sampled=tuple(row["sampled"]),
    )
    if list(table.fields) != list(row["fields"]):
        raise ValueError("its fields are not the ones of this version")
    return table


def _refuse(what: str) -> NoReturn:
    raise BoardSchemaError(what)


def _validate(schema: Schema) -> None:
    run = schema.run
    if not isinstance(run.get("run_id"), str) or not isinstance(run.get("rank"), int) or run["rank"] < 0:
        _refuse(
            f"run needs run_id (text) and rank (0 or more), got {run.get('run_id')!r}, {run.get('rank')!r}"
        )
    board_name(run["run_id"], run["rank"])  # files elsewhere are named after the run, too
    for kind in ("gauges", "counters", "infos", "histograms"):
        series: tuple[Series, ...] = getattr(schema, kind)
        if not all(isinstance(s.name, str) for s in series):
            _refuse(f"names of {kind} must be text")
        if len({s.key for s in series}) != len(series):
            _refuse(f"{kind} holds the same name and labels twice")
    for histogram in schema.histograms:
        bounds = histogram.bounds
        if not all(math.isfinite(b) for b in bounds) or list(bounds) != sorted(set(bounds)):
            _refuse(f"{histogram.name}: bounds must be finite and strictly ascending, got {bounds}")
    for table in schema.tables:
        _validate_table(table)
    if len({t.key for t in schema.tables}) != len(schema.tables):
        _refuse("two tables have the same optimizer name, family and labels")


def _validate_table(table: Table) -> None:
    names = (
        table.optimizer,
        *table.slots,
        *(t.name for t in table.tensors),
        *(t.group for t in table.tensors),
    )
    if not all(isinstance(n, str) for n in names):
        _refuse("names of optimizers, slots, tensors and groups must be text")
    if len(table.slots) != len(table.second_moments):
        _refuse(f"{table.optimizer}: {len(table.slots)} slots but {len(table.second_moments)} second_moments")
    if len(set(table.slots)) != len(table.slots):
        _refuse(f"{table.optimizer}: a slot is named twice: {table.slots}")
    unknown = {*table.absent, *table.sampled} - {*TENSOR_FIELDS, *SLOT_FIELDS}
    if unknown:
        _refuse(f"{table.optimizer}: absent or sampled fields that no row has: {sorted(unknown)}")
    if table.replicas < 1 or any(t.numel < 0 for t in table.tensors):
        _refuse(f"{table.optimizer}: replicas must be at least 1 and numel at least 0")
