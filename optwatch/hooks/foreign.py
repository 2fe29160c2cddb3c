"""Statistics of an optimizer that is not ours, taken after its step from what it left.

Every step: the norm of the gradients and the number of their non-finite elements. Sampled steps: one pass, chunk by
chunk, over gradient, weight and state, in which each chunk is read once from memory and several times from the cache.
Nothing waits for a device, and no tensor is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optwatch.codecs import Kind
from optwatch.hooks.adapters import Adapter, Math, Stored
from optwatch.hooks.adapters.base import flat_like
from optwatch.hooks.maths import maths_of, scalars, step_of
from optwatch.hooks.members import Member, gradients, members, parameters
from optwatch.kernels.cpu.sums import gradient_sums
from optwatch.metrics.fields import CHEAP_FIELDS, MAXIMUM_FIELDS, SLOT_FIELDS, TENSOR_FIELDS, row_fields
from optwatch.optim import PlanStats, StatsLayout, StepStats
from optwatch.optim.layout import flat_copy
from optwatch.optim.sharded import local

#: Elements of a chunk. On a CPU a chunk of gradient, weight and two moments fits the second-level cache, sums in fp32
#: over it are exact to 1e-6, and torch works on it without other threads: waiting for them thousands of times takes
#: seconds where cores are busy. On a GPU launches are what costs.
CHUNK, DEVICE_CHUNK = 1 << 15, 1 << 22

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
        squares = _squares([member.grad for member in stepped])
        rows[_index(positions, rows.device), 0] = squares
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
        """The full rows: partial sums of every chunk, then folded."""
        maths = maths_of(self.adapter, optimizer) if self.sampled else None
        positions = [self._positions[member.index] for member in stepped]
        parts: list[Tensor] = []
        counts: list[int] = []
        for member in stepped:
            slots = {slot.name: slot for slot in self.adapter.slots(optimizer, member.param, member.state)}
            rule = _Rule.of(maths[member.group], member, layout.slots) if maths else None
            chunks = _chunks(member, [slots[name] for name in layout.slots], rule)
            counts.append(len(chunks))
            parts += itertools.chain.from_iterable(chunks)
        table = torch.stack(parts).double().view(sum(counts), -1)
        maxima = torch.tensor(
            [name.rpartition(".")[2] in MAXIMUM_FIELDS for name in row_fields(layout.slots)]
        )
        maxima = maxima.to(rows.device, non_blocking=True)
        folded = [torch.where(maxima, part.amax(0), part.sum(0)) for part in table.split(counts)]
        rows[_index(positions, rows.device)] = torch.stack(folded)
        self._count_nonfinite(rows, positions, stepped)


@dataclass(frozen=True)
class _Rule:
    """The rule of one parameter in its newest step, on a chunk's values."""

    math: Math
    order: tuple[int, ...]  # of the layout's slots, as the rule wants them
    scalars: dict[str, float]

    @classmethod
    def of(cls, math: Math, member: Member, names: Sequence[str]) -> _Rule | None:
        """None where the step's number lies on a device."""
        step = step_of(member.state, 1.0)
        if step is None:
            return None
        row = scalars([math], [step])[0]
        order = tuple(list(names).index(slot.name) for slot in math.rule.slots)
        return cls(math, order, dict(zip(math.rule.scalars, row.tolist(), strict=True)))

    def update(self, values: Sequence[Tensor], grad: Tensor) -> Tensor:
        """What the step subtracted from the weight."""
        return self.math.rule.update([values[i] for i in self.order], grad, self.scalars)


def _chunks(member: Member, slots: Sequence[Stored], rule: _Rule | None) -> list[list[Tensor]]:
    """The sums of each chunk of one parameter, in the order of a row's columns."""
    weight = flat_like(member.param, member.param)
    if weight is None:
        weight = flat_copy(member.param, None)
    size = CHUNK if weight.device.type == "cpu" else DEVICE_CHUNK
    size -= size % max((slot.block for slot in slots), default=1)
    zero = torch.zeros((), device=weight.device)
    made = []
    whole = member.grad.numel() == weight.numel()
    for start in range(0, len(weight), size):
        stop = min(start + size, len(weight))
        grad = member.grad[start:stop].float() if whole else None
        values = [slot.read(start, stop).float() for slot in slots]
        cells = dict.fromkeys(TENSOR_FIELDS, zero)
        cells["weight_sq"] = _square(weight[start:stop].float())
        if grad is not None:
            cells["grad_sq"] = _square(grad)
            if slots and slots[0].kind is Kind.SIGNED:
                cells["moment_grad"] = (values[0] * grad).sum()
            if rule is not None:
                cells["update_sq"] = _square(rule.update(values, grad))
        elif start == 0:  # a sparse gradient has elements of its own
            cells["grad_sq"] = _squares([member.grad])[0].float()
        made.append(
            [
                *cells.values(),
                *(c for s, v in zip(slots, values, strict=True) for c in _slot_sums(s, v, zero)),
            ]
        )
    return made


def _slot_sums(slot: Stored, values: Tensor, zero: Tensor) -> list[Tensor]:
    """The ``SLOT_FIELDS`` of a chunk, with zeros for those that are absent."""
    total = values.sum()
    known = {
        "exact_sq": total if slot.kind is Kind.SECOND_MOMENT else _square(values),
        "sum": total,
        "absmax": values.abs().amax(),
    }
    return [known.get(field, zero) for field in SLOT_FIELDS]


def _square(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm.square()


def _index(positions: Sequence[int], device: torch.device) -> Tensor:
    """An index on ``device``, sent without waiting."""
    return torch.tensor(positions).to(device, non_blocking=True)


def _squares(grads: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each flat tensor, float64 ``[len(grads)]``."""
    chunks: list[Tensor] = []
    counts: list[int] = []
    for grad in grads:
        cut = grad.split(CHUNK if grad.device.type == "cpu" else DEVICE_CHUNK)
        chunks += cut
        counts.append(len(cut))
    norms = torch._foreach_norm(chunks, 2, torch.float32)  # noqa: SLF001 - torch's own clipping calls it
    partial = torch.stack(norms).double().square()
    if len(chunks) == len(grads):
        return partial
    owner = torch.from_numpy(np.repeat(np.arange(len(grads)), counts)).to(partial.device, non_blocking=True)
    return partial.new_zeros(len(grads)).index_add_(0, owner, partial)


def _content(layout: StatsLayout) -> tuple[object, ...]:
    return layout.indices, layout.numel, layout.slots, layout.second_moments, layout.codecs, layout.backend
