"""`MetricSpec`, the description of one metric, and `Catalogue`, the checked collection of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from optwatch.metrics.fields import CHEAP_FIELDS, FAMILIES, SLOT_FIELDS, STEP, TENSOR_FIELDS
from optwatch.metrics.formulas import NUMEL, Formula

Instrument: TypeAlias = Literal["gauge", "counter", "histogram", "info"]
Level: TypeAlias = Literal["tensor", "slot"]

#: UCUM unit -> suffix of the Prometheus name. A ratio carries `.ratio` in its OTel name: OTel's own
#: translations do not agree on a suffix for the unit "1". Curly annotations ("{step}") and "" add nothing.
UNIT_SUFFIXES: Mapping[str, str] = {
    "By": "bytes",
    "s": "seconds",
    "W": "watts",
    "J": "joules",
    "Cel": "celsius",
    "1": "",
    "": "",
}

#: Every label, with what bounds the number of its values. A label that is not here cannot be used.
LABELS: Mapping[str, str] = {
    "run_id": "one run; new for each start of a job",
    "rank": "world size",
    "optimizer": "name given to watch(), by default the class name; numbered when a run has several",
    "group": "groups of tensors, by default 6 by depth of the block",
    "slot": "torch's name of the state tensor: exp_avg, exp_avg_sq, ...",
    "format": "storage formats compared with fp32: the optimizer's own, and that of what_if=",
    "param_group": "index of the optimizer's parameter group",
    "dtype": "storage type as torch names it, without the prefix",
    "device": "torch device of the storage",
    "state": "run_state: running, finished, failed, lost",
    "reason": "fixed words for why something was dropped, skipped or throttled",
    "name": "names given to watch.log(), at most 32",
    "event": "six that are noticed, and at most 16 that watch.event() was given",
    "gpu": "UUID of the device or MIG slice, never an index",
    "error": "ECC: corrected, uncorrected",
    # Only on info metrics, joined with group_left:
    "world_size": "one a run",
    "local_rank": "ranks of a node",
    "host": "one a rank",
    "job_id": "name or number of the scheduler's job",
    "pod": "one a rank, in Kubernetes",
    "pid": "one a rank",
    "replicas": "ranks that hold the same tensors",
    "rule": "update rules",
    "codec": "storage formats, as asked for in the constructor",
    "backend": "reference, cpu, triton",
    "index": "driver's number of the device, for display only",
    "model": "device models",
    "driver": "driver versions",
    "xid": "numbers of the driver's errors, of about 170 that there are",
    "version": "one an agent",
    "python": "one an agent",
}

#: Prometheus and Grafana give these a meaning of their own; a sample that brings them is renamed or refused.
RESERVED_LABELS = frozenset({"job", "instance", "le", "quantile", "type", "stat", "__name__"})

_NAME = re.compile(r"optwatch(\.[a-z][a-z0-9]*(_[a-z0-9]+)*)+")


@dataclass(frozen=True)
class MetricSpec:
    """One metric: the truth that exporters, dashboards, rules, docs and tests are made from.

    Args:
        name: OpenTelemetry name, dotted, below ``optwatch.``.
        instrument: ``info`` is a gauge that is always 1 and carries its facts as labels.
        unit: UCUM unit; ``"1"`` for ratios, whose name ends in ``.ratio``; ``""`` for the tensor's own scale.
        brief: one sentence: what a reader sees.
        labels: names from `LABELS`, in the order in which they are shown.
        buckets: upper bounds of a histogram without +Inf, rising, in `unit`.
        formula: how the value is formed from summed row fields; None where probe or agent have the number.
        requires: "" or what the family is absent without: ``nvidia`` (NVML), ``cuda`` (torch on a GPU), ``otlp``
            (an agent that pushes).
        family: which rows `formula` is taken over, see `optwatch.metrics.fields`.

    Raises:
        ValueError: a part contradicts another; the message names the metric and what to change.
    """

    name: str
    instrument: Instrument
    unit: str
    brief: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    formula: Formula | None = None
    requires: str = ""
    family: str = STEP

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise ValueError(f"metric {self.name!r}: {problem}")

    @property
    def level(self) -> Level | None:
        """Whether `formula` is taken for each slot or once a tensor; None without a formula."""
        if self.formula is None:
            return None
        return "slot" if "slot" in self.labels else "tensor"

    @property
    def needs_full(self) -> bool:
        """Whether the value exists only on steps that took the full statistics."""
        if self.formula is None:
            return False
        return not set(self.formula.fields) <= {*CHEAP_FIELDS, NUMEL}

    @property
    def prometheus(self) -> str:
        """Name of the family in a scrape, e.g. ``optwatch_optimizer_state_bytes``."""
        return prometheus_name(self)

    @property
    def samples(self) -> tuple[str, ...]:
        """Names of the series that the family makes: one, or three for a histogram."""
        if self.instrument == "histogram":
            return tuple(f"{self.prometheus}_{part}" for part in ("bucket", "sum", "count"))
        return (self.prometheus,)

    def check_labels(self, labels: Mapping[str, str]) -> None:
        """Raise ValueError unless `labels` has exactly the names this metric declares."""
        if set(labels) != set(self.labels):
            raise ValueError(
                f"metric {self.name!r} got the labels {sorted(labels)}, expected {sorted(self.labels)}; "
                "pass exactly these or change its line in the catalogue"
            )


def prometheus_name(spec: MetricSpec) -> str:
    """Return the Prometheus name: a pure function of name, instrument and unit, shared by all exporters."""
    parts = [spec.name.replace(".", "_")]
    suffix = UNIT_SUFFIXES.get(spec.unit, "")
    if suffix:
        parts.append(suffix)
    if spec.instrument == "counter":
        parts.append("total")
    elif spec.instrument == "info":
        parts.append("info")
    return "_".join(parts)


def _problems(spec: MetricSpec) -> Iterator[str]:
    """Yield what is wrong with a spec."""
    if not _NAME.fullmatch(spec.name):
        yield "a name is lower case, dotted and starts with 'optwatch.'"
    if spec.unit not in UNIT_SUFFIXES and not re.fullmatch(r"\{[a-z_]+\}", spec.unit):
        yield f"unit {spec.unit!r} is not one of {sorted(UNIT_SUFFIXES)} or a '{{thing}}' that is counted"
    if (spec.unit == "1") != spec.name.endswith(".ratio"):
        yield "unit '1' and a name that ends in '.ratio' go together"
    if not spec.brief or spec.brief.endswith("."):
        yield "needs a brief, one sentence without the full stop"
    if spec.name.endswith({"counter": ".total", "info": ".info"}.get(spec.instrument, "\0")):
        yield "the suffix follows from the instrument: take it out of the name"
    yield from _label_problems(spec)
    yield from _value_problems(spec)


def _label_problems(spec: MetricSpec) -> Iterator[str]:
    for label in spec.labels:
        if label in RESERVED_LABELS:
            yield f"label {label!r} has a meaning of its own in Prometheus: choose another word"
        elif label not in LABELS:
            yield f"label {label!r} is not in LABELS: add it there with what bounds its values"
    if len(set(spec.labels)) != len(spec.labels):
        yield f"a label is listed twice in {spec.labels}"
    if "rank" in spec.labels and "run_id" not in spec.labels:
        yield "a series of a rank also carries run_id"


def _value_problems(spec: MetricSpec) -> Iterator[str]:
    if (spec.instrument == "histogram") != bool(spec.buckets):
        yield "a histogram, and only a histogram, lists its buckets"
    if any(a >= b for a, b in zip(spec.buckets, spec.buckets[1:], strict=False)):
        yield f"buckets must rise, got {spec.buckets}"
    if spec.family not in FAMILIES:
        yield f"family {spec.family!r} is not one of {FAMILIES}"
    if spec.formula is None:
        return
    if spec.instrument != "gauge":
        yield "a formula makes a gauge: counters are summed at the source and lose nothing"
    unknown = set(spec.formula.fields) - {*TENSOR_FIELDS, *SLOT_FIELDS, NUMEL}
    if unknown:
        yield f"formula reads {sorted(unknown)}, which no kernel sums; see optwatch.metrics.fields"


class Catalogue(Mapping[str, MetricSpec]):
    """The metrics by OpenTelemetry name, in order of registration.

    Raises:
        ValueError: two metrics share a name, in OpenTelemetry or as a series in Prometheus.
        KeyError: an unknown name is looked up.
    """

    def __init__(self, families: Mapping[str, Iterable[MetricSpec]]) -> None:
        self._specs: dict[str, MetricSpec] = {}
        self._samples: dict[str, MetricSpec] = {}
        self._families: dict[str, tuple[MetricSpec, ...]] = {}
        for family, specs in families.items():
            self._families[family] = tuple(specs)
            for spec in self._families[family]:
                self._add(spec)

    def _add(self, spec: MetricSpec) -> None:
        for sample in {spec.prometheus, *spec.samples}:
            other = self._samples.setdefault(sample, spec)
            if other is not spec:
                raise ValueError(
                    f"metric {spec.name!r} and metric {other.name!r} both make series {sample!r}; rename one"
                )
        if spec.name in self._specs:
            raise ValueError(f"metric {spec.name!r} is registered twice; remove one line")
        self._specs[spec.name] = spec

    def __getitem__(self, name: str) -> MetricSpec:
        try:
            return self._specs[name]
        except KeyError:
            raise KeyError(f"no metric {name!r} in the catalogue; known: {', '.join(self._specs)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    @property
    def families(self) -> Mapping[str, tuple[MetricSpec, ...]]:
        """Metrics by the heading under which docs and dashboards show them."""
        return self._families

    def sample(self, name: str) -> MetricSpec | None:
        """Return the metric that makes the Prometheus series `name` (``..._bucket`` too), or None."""
        return self._samples.get(name)

    def formed(self, level: Level, family: str = STEP) -> tuple[MetricSpec, ...]:
        """Return the metrics whose value is formed from rows of a family, for each slot or for each tensor."""
        return tuple(spec for spec in self._specs.values() if spec.level == level and spec.family == family)
