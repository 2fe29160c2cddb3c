"""From rows of sums to values: group, add, then form the ratios of the catalogue."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from optwatch.board import Table, TensorInfo, fold_to_groups
from optwatch.exporters.base import Point
from optwatch.metrics.catalogue import CATALOGUE
from optwatch.metrics.fields import CHEAP_FIELDS
from optwatch.metrics.formulas import present, sums_of
from optwatch.metrics.spec import MetricSpec


class TableView:
    """The newest rows of one table, and the points made of them.

    A value that needs the full statistics comes from the newest full row as a whole: fields of different steps are
    never mixed.
    """

    def __init__(self, table: Table, labels: dict[str, str]) -> None:
        self._table = table
        self._fold = fold_to_groups(table)
        # Made once: a scrape has hundreds of points, and their labels never change.
        groups = [tensor.name for tensor in self._fold.table.tensors]
        own = {**labels, "optimizer": table.optimizer, **table.labels}
        self._labels = [{**own, "group": group} for group in groups]
        self._slot_labels = [
            [{**own, "slot": slot, "group": group} for group in groups] for slot in table.slots
        ]
        self._numel = np.array([tensor.numel for tensor in self._fold.table.tensors], dtype=np.float64)
        # Where the first slot is no first moment its angle to the gradient is not summed, and absent is not 0.
        absent = {*table.absent, *(("moment_grad",) if any(table.second_moments[:1]) else ())}
        tensor = [spec for spec in CATALOGUE.formed("tensor", table.family) if not _reads(spec, absent)]
        self._on_sample = tuple(spec for spec in tensor if spec.needs_full or _reads(spec, table.sampled))
        self._on_step = tuple(spec for spec in tensor if spec not in self._on_sample)
        self._of_slot = tuple(
            spec for spec in CATALOGUE.formed("slot", table.family) if not _reads(spec, absent)
        )
        self._cheap: NDArray[np.float64] | None = None
        self._full: NDArray[np.float64] | None = None

    def take(self, rows: NDArray[np.float64]) -> None:
        """Keep the rows of a newer step."""
        if rows.shape[1] > len(CHEAP_FIELDS):
            self._full = rows
        self._cheap = rows[:, : len(CHEAP_FIELDS)]

    def worst(self, spec: MetricSpec, count: int) -> list[tuple[TensorInfo, str, float]]:
        """The tensors with the largest values of a metric: tensor, slot (or "") and value, NaN before all others."""
        if self._full is None or spec.formula is None:
            return []
        numel = np.array([tensor.numel for tensor in self._table.tensors], dtype=np.float64)
        slots = self._table.slots if "slot" in spec.labels else ("",)
        found: list[tuple[TensorInfo, str, float]] = []
        with np.errstate(all="ignore"):
            for index, slot in enumerate(slots):
                sums = sums_of(self._full, numel, index)
                values = spec.formula.value(sums)
                shown = np.flatnonzero(present(spec.formula, sums))
                keys = np.where(np.isnan(values[shown]), np.inf, values[shown])
                order = shown[np.lexsort((~np.isnan(values[shown]), -keys))][:count]
                found += [(self._table.tensors[i], slot, float(values[i])) for i in order]
        found.sort(key=lambda one: (not math.isnan(one[2]), -one[2] if not math.isnan(one[2]) else 0.0))
        return found[:count]

    def points(self) -> Iterator[tuple[str, Point]]:
        """Metric name and point of every value that exists."""
        # Inf - Inf in the sums of sick rows is a NaN to be shown, not a reason for a warning.
        with np.errstate(all="ignore"):
            if self._cheap is not None:
                yield from self._level(self._fold.apply(self._cheap), 0, self._labels, self._on_step)
            if self._full is None:
                return
            merged = self._fold.apply(self._full)
            yield from self._level(merged, 0, self._labels, self._on_sample)
            for index, labels in enumerate(self._slot_labels):
                yield from self._level(merged, index, labels, self._of_slot)

    def _level(
        self,
        merged: NDArray[np.float64],
        slot: int,
        labels: list[dict[str, str]],
        specs: Iterable[MetricSpec],
    ) -> Iterator[tuple[str, Point]]:
        sums = sums_of(merged, self._numel, slot)
        for spec in specs:
            if spec.formula is None or not sums.keys() >= set(spec.formula.fields):
                continue  # a rule without slots has no moment to speak of
            shown, values = present(spec.formula, sums), spec.formula.value(sums)
            for own, show, value in zip(labels, shown.tolist(), values.tolist(), strict=True):
                if show:
                    yield spec.name, Point(own, value)


def _reads(spec: MetricSpec, fields: Iterable[str]) -> bool:
    return spec.formula is not None and not set(spec.formula.fields).isdisjoint(fields)
