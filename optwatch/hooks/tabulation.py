"""A table of the board and the way of rows into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from optwatch.board import Histogram, Series, Table, TensorInfo
from optwatch.board.writer import Values
from optwatch.hooks.figures import NONE, Figures
from optwatch.metrics.fields import CHEAP_FIELDS, STEP, maximum_columns, row_fields, row_length
from optwatch.optim import StatsLayout

#: Gives the name and the group of each parameter of an optimizer.
Naming = Callable[[torch.optim.Optimizer], "tuple[Sequence[str], Sequence[str]]"]
#: Gives the number of ranks that hold the same piece of a tensor.
Replicas = Callable[[torch.Tensor], int]


class Tabulation:
    """Describes the rows of some layouts as one table, layout after layout, and puts rows where they belong.

    A source for the publisher that has nothing but its table.
    """

    def __init__(self, name: str, naming: Naming, replicas: Replicas, family: str = STEP) -> None:
        self.table: Table | None = None
        self._name, self._naming, self._replicas, self._family = name, naming, replicas, family
        self._layouts: tuple[StatsLayout, ...] = ()
        self._offsets: dict[int, int] = {}  # first row of each layout, by identity
        self._share: Values | None = None  # of each row, where tensors differ in their replicas
        self._known: tuple[object, ...] = ()

    def lay_out(
        self,
        layouts: tuple[StatsLayout, ...],
        optimizer: torch.optim.Optimizer,
        labels: Mapping[str, str] | None = None,
        absent: tuple[str, ...] = (),
        sampled: tuple[str, ...] = (),
    ) -> bool:
        """Describe the rows; whether the table is another one now."""
        known = (layouts, dict(labels or {}), absent, sampled)
        if known == self._known:
            return False
        self._known, self._layouts = known, layouts
        self._offsets, start = {}, 0
        for layout in layouts:
            self._offsets[id(layout)] = start
            start += len(layout.indices)
        if not layouts:
            return False
        names, groups = self._naming(optimizer)
        # Groups of one optimizer may differ in their slots (amsgrad): a plan leaves the columns of others' at zero.
        slots = {s: m for layout in layouts for s, m in zip(layout.slots, layout.second_moments, strict=True)}
        self.table = Table(
            optimizer=self._name,
            slots=tuple(slots),
            second_moments=tuple(slots.values()),
            tensors=tuple(
                TensorInfo(names[index], groups[index], numel)
                for layout in layouts
                for index, numel in zip(layout.indices, layout.numel, strict=True)
            ),
            replicas=self._share_replicas(optimizer),
            family=self._family,
            labels=dict(labels or {}),
            absent=absent,
            sampled=sampled,
        )
        return True

    def clear(self) -> None:
        """Have no table any more."""
        self.table, self._layouts, self._offsets, self._known = None, (), {}, ()

    def holds(self, layout: StatsLayout) -> bool:
        """Whether rows of ``layout`` belong here."""
        return id(layout) in self._offsets

    def fill(self, plans: Sequence[tuple[StatsLayout, Values]], full: bool) -> Values | None:
        """The rows of the whole table, zero where no plan has any; None without a table. Not to be written to.

        Such that sums over ranks can be divided by the table's replicas.
        """
        if self.table is None:
            return None
        width = row_length(len(self.table.slots)) if full else len(CHEAP_FIELDS)
        if self._share is None and len(plans) == len(self._layouts) == 1:
            ((layout, values),) = plans  # as almost always: the rows are the table's
            if layout.slots == self.table.slots:
                return values[:, :width]
        table = np.zeros((len(self.table.tensors), width))
        for layout, values in plans:
            start = self._offsets[id(layout)]
            place = table[start : start + len(values)]
            if full and layout.slots != self.table.slots:
                place[:, _columns(layout, self.table)] = values
            else:
                place[:] = values[:, :width]
        if self._share is not None:
            summed = ~maximum_columns(len(self.table.slots))[:width]
            table[:, summed] *= self._share
        return table

    def _share_replicas(self, optimizer: torch.optim.Optimizer) -> int:
        """The number by which sums over ranks of every row are to be divided.

        Where tensors differ in it (a part of the model is sharded, another copied), the rows of those with more
        copies are made smaller for it beforehand.
        """
        params = [param for group in optimizer.param_groups for param in group["params"]]
        copies = np.array(
            [self._replicas(params[index]) for layout in self._layouts for index in layout.indices],
            np.float64,
        )
        least = int(copies.min())
        self._share = None if (copies == least).all() else least / copies[:, None]
        return least

    # --- a source without values of its own -------------------------------------------------------------------------

    def gauges(self) -> Figures:
        """None."""
        return NONE

    def counters(self) -> Figures:
        """None."""
        return NONE

    def histograms(self) -> Sequence[tuple[Series, Histogram]]:
        """None."""
        return ()

    def infos(self) -> Sequence[Series]:
        """None."""
        return []


def _columns(layout: StatsLayout, table: Table) -> list[int]:
    """The columns of ``table`` that the columns of a full row of ``layout`` go to."""
    position = {name: i for i, name in enumerate(row_fields(table.slots))}
    return [position[name] for name in row_fields(layout.slots)]
