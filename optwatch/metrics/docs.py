"""Write docs/metrics.md from the catalogue: ``python -m optwatch.metrics.docs [PATH]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from optwatch.metrics.catalogue import CATALOGUE
from optwatch.metrics.fields import CHEAP_FIELDS, SLOT_FIELDS, TENSOR_FIELDS
from optwatch.metrics.spec import LABELS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from optwatch.metrics.spec import MetricSpec

DEFAULT_PATH = Path("docs/metrics.md")

_HEAD = """\
# Metrics

Made from the catalogue (`optwatch/metrics/catalogue.py`) by `make generate`; do not edit.

Units are base units, ratios run from 0 to 1, counters end in `_total`, info metrics are 1. A value that could not be
read is absent, never zero; a formula that comes to 0/0 is absent too. Ages are left to the reader:
`time() - optwatch_last_step_timestamp_seconds`.

Over ranks, show the maximum and the mean of ratios; the sum of a norm over ranks that hold the same tensors means
nothing. Formulas are taken over the sums of a group of tensors: of rows, tensors and work items, which merge by
addition (`absmax` by maximum). Where a formula reads more than {cheap}, the value exists
only for steps that took the full statistics (`every=`), and `optwatch_last_sample_timestamp_seconds` says when that
was.
"""

_ROW = "| {} | {} | {} | {} | {} | {} |"


def generate() -> str:
    """Return the text of docs/metrics.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _HEAD.format(cheap=", ".join(f"`{field}`" for field in CHEAP_FIELDS))
    for family, specs in CATALOGUE.families.items():
        yield f"## {family}\n"
        yield _ROW.format("Prometheus", "OpenTelemetry", "instrument, unit", "labels", "meaning", "formula")
        yield _ROW.format(*["---"] * 6)
        for spec in specs:
            yield _row(spec)
        yield ""
    yield "## Labels\n"
    yield "| label | values are bounded by |\n| --- | --- |"
    for label, bound in LABELS.items():
        yield f"| `{label}` | {bound} |"
    yield "\n## Fields that formulas read\n"
    yield f"Of a tensor: {_names(TENSOR_FIELDS)}; of each of its slots: {_names(SLOT_FIELDS)}."
    yield "Their meaning is written in `optwatch/metrics/fields.py`."


def _row(spec: MetricSpec) -> str:
    unit = f"{spec.instrument}, {spec.unit}" if spec.unit else spec.instrument
    meaning = spec.brief
    if spec.buckets:
        meaning += f"; buckets {', '.join(f'{bound:g}' for bound in spec.buckets)}"
    if spec.requires:
        meaning += f" ({spec.requires})"
    formula = f"`{spec.formula}`" if spec.formula else ""
    return _ROW.format(f"`{spec.prometheus}`", f"`{spec.name}`", unit, _names(spec.labels), meaning, formula)


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def main() -> None:
    """Write the page to the path given on the command line, by default docs/metrics.md below this folder."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_PATH
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(generate(), encoding="utf-8")


if __name__ == "__main__":
    main()
