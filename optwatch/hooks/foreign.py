"""Statistics of an optimizer that is not ours, taken after its step from what it left.

Every step: the norm of the gradients and the number of their non-finite elements. Sampled steps: one pass over
gradient, weight and state, in which each value is read once from memory. Nothing waits for a device, and no tensor is
kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from optwatch.codecs import Kind
from optwatch.hooks.adapters import Adapter, Math, Stored
from optwatch.hooks.chunks import DEVICE_CHUNK, chunk_sums, squares
from optwatch.hooks.compiled import compiled_rows
from optwatch.hooks.maths import maths_of, step_of
from optwatch.hooks.members import Member, Stepped, gradients, members, parameters
from optwatch.kernels.cpu.sums import gradient_sums
from optwatch.metrics.fields import CHEAP_FIELDS, maximum_columns, row_fields
from optwatch.optim import PlanStats, StatsLayout, StepStats
from optwatch.optim.sharded import local

#: What nobody can know without the kernel: the exact values before they were stored, and the old weights.
ABSENT = ("update_error_sq", "unchanged", "error_sq", "underflow", "saturated")


class Foreign:
    """Makes the :class:`StepStats` that one of ours would deliver, as far as they can be had.

    ``absent`` and ``sampled`` are those of the table that the rows belong to; they settle with the layouts.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.absent: tuple[str, ...] = (*ABSENT, "update_sq")
        self.sampled: tuple[str, ...] = ()
        self._layouts: dict[torch.device, StatsLayout] = {}
        self._rows: dict[torch.device, list[Tensor]] = {}
        self._positions: dict[int, int] = {}
        #: Used in turn: ``GRADIENT_SUMS`` of each parameter, which begin like a row of the cheap fields.
        self._cheap = [torch.zeros(0), torch.zeros(0)]

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer, step: int, full: bool) -> StepStats:
        """The rows of the step that has just ended."""
        if not full and (stats := self._quickly(optimizer, step)) is not None:
            return stats
        stepped = members(optimizer)
        if full or not self._covers(stepped):
            self._lay_out(optimizer)
        plans = []
        for device, layout in self._layouts.items():
            here = [member for member in stepped if member.grad.device == device]
            if not here:
                continue
            rows = self._buffer(device, layout)
            if full:
                self._fill(rows, layout, optimizer, here)
            else:
                self._fill_cheap(rows, here)
            plans.append(PlanStats(layout, rows))
        return StepStats(step, full, tuple(self._layouts.values()), tuple(plans))

    def _quickly(self, optimizer: torch.optim.Optimizer, step: int) -> StepStats | None:
        """The cheap rows by the compiled library, if it can sum all gradients and a row is laid out for each."""
        if [device.type for device in self._layouts] != ["cpu"]:
            return None
        (layout,) = self._layouts.values()
        grads = gradients(optimizer)
        if len(grads) != len(layout.indices):
            return None
        self._cheap.reverse()
        if len(self._cheap[0]) != len(grads):
            self._cheap[0] = torch.zeros(len(grads), len(CHEAP_FIELDS), dtype=torch.float64)
        rows = self._cheap[0]
        sums = rows.numpy()
        if not gradient_sums(grads, sums):
            return None
        sums[:, CHEAP_FIELDS.index("update_sq")] = 0.0
        plans = (PlanStats(layout, rows),) if any(grad is not None for grad in grads) else ()
        return StepStats(step, False, (layout,), plans)

    # --- layout -----------------------------------------------------------------------------------------------------

    def _covers(self, stepped: Sequence[Member]) -> bool:
        return all(member.index in self._positions for member in stepped)

    def _lay_out(self, optimizer: torch.optim.Optimizer) -> None:
        """One row for each parameter, and the slots that all stepped parameters of a device have."""
        found: dict[torch.device, list[tuple[int, Tensor, list[Stored] | None]]] = {}
        for index, (whole, state, _) in enumerate(parameters(optimizer)):
            param = local(whole)
            slots = self.adapter.slots(optimizer, param, state) if state else None
            found.setdefault(param.device, []).append((index, param, slots))
        layouts = {device: self._layout(entries) for device, entries in found.items()}
        for device, layout in layouts.items():
            if self._layouts.get(device) is None or _content(self._layouts[device]) != _content(layout):
                self._layouts[device] = layout
                self._rows.pop(device, None)
        self._layouts = {device: self._layouts[device] for device in layouts}
        self._positions = {
            index: row for layout in layouts.values() for row, index in enumerate(layout.indices)
        }
        exact = all(
            slot.exact for entries in found.values() for _, _, slots in entries for slot in slots or ()
        )
        known = exact and all(self._computable(optimizer, layout) for layout in layouts.values())
        self.absent = ABSENT if known else (*ABSENT, "update_sq")
        self.sampled = ("update_sq",) if known else ()

    def _computable(self, optimizer: torch.optim.Optimizer, layout: StatsLayout) -> bool:
        """Whether the update follows from what is left after the step: rules and slots are known, in fp32."""
        maths = maths_of(self.adapter, optimizer)
        return maths is not None and all(
            {slot.name for slot in math.rule.slots} <= set(layout.slots) for math in maths
        )

    def _layout(self, entries: Sequence[tuple[int, Tensor, list[Stored] | None]]) -> StatsLayout:
        lists = [slots for _, _, slots in entries if slots is not None]
        common = {slot.name for slot in lists[0]} if lists else set()
        for slots in lists:
            common &= {slot.name for slot in slots}
        slots = [slot for slot in lists[0] if slot.name in common] if lists else []
        formats = {slot.format for group in lists for slot in group}
        return StatsLayout(
            indices=tuple(index for index, _, _ in entries),
            numel=tuple(param.numel() for _, param, _ in entries),
            slots=tuple(slot.name for slot in slots),
            second_moments=tuple(slot.kind is Kind.SECOND_MOMENT for slot in slots),
            codecs=tuple(sorted(formats)),
            backend=self.adapter.name,
        )

    def _buffer(self, device: torch.device, layout: StatsLayout) -> Tensor:
        """The rows of one step, zero; used again two steps later."""
        ring = self._rows.setdefault(device, [])
        if len(ring) < 2:
            columns = len(row_fields(layout.slots))
            ring.append(torch.zeros(len(layout.indices), columns, dtype=torch.float64, device=device))
        else:
            ring.append(ring.pop(0))
        return ring[-1].zero_()

    # --- sums -------------------------------------------------------------------------------------------------------

    def _fill_cheap(self, rows: Tensor, stepped: Sequence[Member]) -> None:
        positions = [self._positions[member.index] for member in stepped]
        rows[_index(positions, rows.device), 0] = squares([member.grad for member in stepped])
        self._count_nonfinite(rows, positions, stepped)

    def _count_nonfinite(self, rows: Tensor, positions: Sequence[int], stepped: Sequence[Member]) -> None:
        """A sum of squares that is finite says that all elements are; on a GPU nobody may ask before it is over."""
        column = CHEAP_FIELDS.index("nonfinite")
        sick = ~np.isfinite(rows.numpy()[:, 0]) if rows.device.type == "cpu" else None
        for position, member in zip(positions, stepped, strict=True):
            if sick is None or sick[position]:
                rows[position, column] = sum(
                    chunk.isfinite().logical_not().sum() for chunk in member.grad.split(DEVICE_CHUNK)
                )

    def _fill(
        self, rows: Tensor, layout: StatsLayout, optimizer: torch.optim.Optimizer, stepped: Sequence[Member]
    ) -> None:
        """The full rows: by the compiled library what that can read, and the rest by partial sums of every chunk."""
        maths = maths_of(self.adapter, optimizer) if self.sampled else None
        others = [self._stepped(member, layout, optimizer, maths) for member in stepped]
        if rows.device.type == "cpu":
            positions = [self._positions[member.index] for member in stepped]
            others = compiled_rows(others, positions, rows.numpy())
        if not others:
            return
        positions = [self._positions[one.member.index] for one in others]
        chunks = [chunk_sums(one) for one in others]
        counts = list(map(len, chunks))
        cells = itertools.chain.from_iterable(itertools.chain.from_iterable(chunks))
        table = torch.stack(list(cells)).double().view(sum(counts), -1)
        maxima = torch.from_numpy(maximum_columns(len(layout.slots))).to(rows.device, non_blocking=True)
        folded = [torch.where(maxima, part.amax(0), part.sum(0)) for part in table.split(counts)]
        rows[_index(positions, rows.device)] = torch.stack(folded)
        self._count_nonfinite(rows, positions, [one.member for one in others])

    def _stepped(
        self, member: Member, layout: StatsLayout, optimizer: torch.optim.Optimizer, maths: list[Math] | None
    ) -> Stepped:
        slots = {slot.name: slot for slot in self.adapter.slots(optimizer, member.param, member.state)}
        step = step_of(member.state, 1.0)  # None where it lies on a device
        math = None if maths is None or step is None else maths[member.group]
        return Stepped(member, [slots[name] for name in layout.slots], math, step or 1.0)


def _index(positions: Sequence[int], device: torch.device) -> Tensor:
    """An index on ``device``, sent without waiting."""
    return torch.tensor(positions).to(device, non_blocking=True)


def _content(layout: StatsLayout) -> tuple[object, ...]:
    return layout.indices, layout.numel, layout.slots, layout.second_moments, layout.codecs, layout.backend
