"""How a value is formed from summed statistics: the only place where ratios and roots are taken.

Kernels and boards carry sums (and maxima); ranks, tensors and tiles merge by addition. A formula turns the
merged sums into the published value, at the very end. The set is closed and small on purpose: an exporter, a
dashboard or a test can enumerate it, and `docs/metrics.md` prints each formula from its fields.

Sums arrive as a mapping from field name to a float64 vector over groups of tensors:

* the tensor and slot fields of `optwatch.metrics.fields`; for a tensor-level metric the slot fields are those of
  the rule's first slot,
* ``numel``: how many elements the sums run over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from optwatch.metrics.fields import SLOT_FIELDS, TENSOR_FIELDS

Vector: TypeAlias = NDArray[np.float64]
Sums: TypeAlias = Mapping[str, Vector]

NUMEL = "numel"


def _divide(numerator: Vector, denominator: Vector) -> Vector:
    """Return the quotient; 0/0 is NaN, which every reader treats as *absent*, and never a zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.divide(numerator, denominator), dtype=np.float64)


def _root(squares: Vector) -> Vector:
    """Return the square root; NaN and Inf stay visible."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.sqrt(squares), dtype=np.float64)


@dataclass(frozen=True)
class Norm:
    """√Σx² from the sum of squares `squares`; absent where there are no elements."""

    squares: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that have to be summed for this value."""
        return (self.squares,)

    def value(self, sums: Sums) -> Vector:
        """Return one value for each entry of the vectors in `sums`."""
        return np.where(sums[NUMEL] > 0, _root(sums[self.squares]), np.nan)

    def __str__(self) -> str:
        return f"√Σ{self.squares}"


@dataclass(frozen=True)
class Ratio:
    """Σa / Σb."""

    numerator: str
    denominator: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that have to be summed for this value."""
        return (self.numerator, self.denominator)

    def value(self, sums: Sums) -> Vector:
        """Return one value for each entry of the vectors in `sums`."""
        return _divide(sums[self.numerator], sums[self.denominator])

    def __str__(self) -> str:
        return f"Σ{self.numerator} / Σ{self.denominator}"


@dataclass(frozen=True)
class RootRatio:
    """√(Σa / Σb): the ratio of two root-mean-squares taken over the same elements."""

    numerator: str
    denominator: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that have to be summed for this value."""
        return (self.numerator, self.denominator)

    def value(self, sums: Sums) -> Vector:
        """Return one value for each entry of the vectors in `sums`."""
        return _root(_divide(sums[self.numerator], sums[self.denominator]))

    def __str__(self) -> str:
        return f"√(Σ{self.numerator} / Σ{self.denominator})"


@dataclass(frozen=True)
class Mean:
    """Σx / number of elements; of a count of elements: the fraction they make up."""

    field: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that have to be summed for this value."""
        return (self.field, NUMEL)

    def value(self, sums: Sums) -> Vector:
        """Return one value for each entry of the vectors in `sums`."""
        return _divide(sums[self.field], sums[NUMEL])

    def __str__(self) -> str:
        return f"Σ{self.field} / Σ{NUMEL}"


@dataclass(frozen=True)
class RootMean:
    """√(Σx² / number of elements)."""

    squares: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that have to be summed for this value."""
        return (self.squares, NUMEL)

    def value(self, sums: Sums) -> Vector:
        """Return one value for each entry of the vectors in `sums`."""
        return _root(_divide(sums[self.squares], sums[NUMEL]))

    def __str__(self) -> str:
        return f"√(Σ{self.squares} / Σ{NUMEL})"


@dataclass(frozen=True)
class Maximum:
    """The largest value of a field that merges by maximum; absent where there are no elements."""

    field: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that have to be merged for this value."""
        return (self.field,)

    def value(self, sums: Sums) -> Vector:
        """Return one value for each entry of the vectors in `sums`."""
        return np.where(sums[NUMEL] > 0, sums[self.field], np.nan)

    def __str__(self) -> str:
        return f"max {self.field}"


@dataclass(frozen=True)
class Cosine:
    """Σa·b / √(Σa² Σb²): the cosine of the angle between two vectors."""

    product: str
    left_squares: str
    right_squares: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that have to be summed for this value."""
        return (self.product, self.left_squares, self.right_squares)

    def value(self, sums: Sums) -> Vector:
        """Return one value for each entry of the vectors in `sums`."""
        # Two roots, not the root of a product: the product of two small sums of squares underflows.
        length = _root(sums[self.left_squares]) * _root(sums[self.right_squares])
        return _divide(sums[self.product], length)

    def __str__(self) -> str:
        return f"Σ{self.product} / √(Σ{self.left_squares} · Σ{self.right_squares})"


Formula: TypeAlias = Norm | Ratio | RootRatio | Mean | RootMean | Maximum | Cosine


def sums_of(rows: Vector, numel: Vector, slot: int = 0) -> Sums:
    """Name the columns of merged rows, as `Formula.value` wants them.

    Args:
        rows: float64 ``[groups, columns]``: full rows as laid out in `optwatch.metrics.fields`, or only their
            first, cheap columns; then the fields that are missing are missing from the mapping too.
        numel: float64 ``[groups]``, elements behind each row.
        slot: index of the slot whose fields are named; 0, the rule's first slot, for tensor-level metrics.

    Returns:
        Mapping from field name to a view of its column, float64 ``[groups]``.
    """
    first = len(TENSOR_FIELDS) + slot * len(SLOT_FIELDS)
    columns = [*enumerate(TENSOR_FIELDS), *enumerate(SLOT_FIELDS, start=first)]
    return {NUMEL: numel, **{name: rows[:, column] for column, name in columns if column < rows.shape[1]}}


def present(formula: Formula, sums: Sums) -> NDArray[np.bool_]:
    """Tell, for each entry, whether the value is to be shown.

    A 0/0 (nothing stepped, nothing to divide by) is absent. A NaN or Inf that the sums brought along is not: it
    happened in training and has to be seen.
    """
    brought = np.zeros(np.shape(sums[NUMEL]), dtype=np.bool_)
    for name in formula.fields:
        brought |= ~np.isfinite(sums[name])
    return (sums[NUMEL] > 0) & (brought | ~np.isnan(formula.value(sums)))
