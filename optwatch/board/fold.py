"""Folding the rows of tensors to rows of groups, for models with too many tensors for a board."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from optwatch.board.errors import BoardTooLargeError
from optwatch.board.layout import Layout
from optwatch.board.schema import Schema, Table, TensorInfo
from optwatch.metrics.fields import merge_rows

#: Above this many tensors a table is folded even if it would fit.
MAXIMUM_TENSORS = 5000


@dataclass(frozen=True)
class Fold:
    """A folded table, and how its rows are made from those of the table it replaces."""

    table: Table
    order: NDArray[np.intp]
    starts: NDArray[np.intp]

    def apply(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Merge ``[tensors, columns]`` (full or cheap columns) to ``[groups, columns]``."""
        return merge_rows(rows[self.order], self.starts, len(self.table.slots))


def fold_to_groups(table: Table) -> Fold:
    """One row per group, in the order in which the groups first appear; the row is named after its group."""
    names = list(dict.fromkeys(t.group for t in table.tensors))
    position = {name: i for i, name in enumerate(names)}
    groups = np.array([position[t.group] for t in table.tensors], dtype=np.intp)
    numel = np.zeros(len(names), dtype=np.int64)
    np.add.at(numel, groups, np.array([t.numel for t in table.tensors], dtype=np.int64))
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(len(names)))
    tensors = tuple(TensorInfo(name, name, int(n)) for name, n in zip(names, numel, strict=True))
    return Fold(replace(table, tensors=tensors), order, starts)


def fit(schema: Schema) -> tuple[Schema, tuple[Fold | None, ...]]:
    """Fold the largest tables until the schema fits a board.

    Returns the schema to write with and, per table, the fold that its rows have to go through (None = as they are).
    Raises BoardTooLargeError if the schema does not fit even then.
    """
    tables: list[Table] = list(schema.tables)
    folds: list[Fold | None] = [None] * len(tables)

    def fold(index: int) -> None:
        made = fold_to_groups(tables[index])
        tables[index], folds[index] = made.table, made

    for index, table in enumerate(tables):
        if len(table.tensors) > MAXIMUM_TENSORS:
            fold(index)
    while not _fits(fitted := replace(schema, tables=tuple(tables))):
        left = [i for i, made in enumerate(folds) if made is None]
        if not left:
            Layout.fit(fitted, len(fitted.to_json()))  # raises, naming the sizes
        fold(max(left, key=lambda i: _cells(tables[i])))
    return fitted, tuple(folds)


def _cells(table: Table) -> int:
    return len(table.tensors) * table.width


def _fits(schema: Schema) -> bool:
    try:
        Layout.fit(schema, len(schema.to_json()))
    except BoardTooLargeError:
        return False
    return True


def apply_folds(
    folds: Sequence[Fold | None], rows: Sequence[NDArray[np.float64] | None]
) -> list[NDArray[np.float64] | None]:
    """Send each table's rows through its fold."""
    return [
        row if row is None or made is None else made.apply(row) for made, row in zip(folds, rows, strict=True)
    ]
