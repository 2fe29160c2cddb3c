"""The step computed once more, in fp32, on sampled blocks: what quantisation did, where no kernel tells.

Two uses of the same arithmetic. An *estimate* takes, on sampled steps, the stored state before the step, applies the
rule, and compares with what was stored after it: the error of one step. A *shadow* keeps its fp32 state from step to
step and compares that: the error that has accumulated. A shadow also keeps the state that other formats would have
(``what_if``), stepped through the same rule with the same gradients.

Blocks are drawn once, the same share of every tensor, and sums are scaled up to the tensor, so that groups of tensors
are estimated without bias. The weights are the real ones: what other weights the exact state would have led to, and
what gradients, is not asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optwatch.codecs import Codec, Kind, state_format
from optwatch.hooks.adapters import Adapter, Math, Stored
from optwatch.hooks.adapters.base import flat_like, take
from optwatch.hooks.maths import maths_of, scalars, step_of
from optwatch.hooks.members import Parameter, flat_gradient, parameters
from optwatch.kernels import random
from optwatch.kernels.plan import DECISION
from optwatch.metrics.fields import SLOT_FIELDS, TENSOR_FIELDS
from optwatch.optim import Optimizer, StatsLayout
from optwatch.optim.formats import formats_of
from optwatch.optim.sharded import local
from optwatch.rules import Rule

#: Elements of a sampled block; a multiple of it where a format's own blocks are longer.
SIZE = 256
_SEED = 0x0B10C5
#: What these rows do not hold.
ABSENT = tuple({*TENSOR_FIELDS, *SLOT_FIELDS} - {"update_sq", "update_error_sq", "error_sq", "exact_sq"})


@dataclass(eq=False)
class _Member:
    """The sampled blocks of one parameter: rows ``[start, stop)`` of its batch."""

    index: int  # counted through all groups
    group: int
    numel: int
    blocks: Tensor
    start: int
    stop: int
    step: float  # the newest one seen
    mark: tuple[int, ...]  # identities of its state tensors


class _WhatIf:
    """The state of a batch in another format."""

    def __init__(self, rule: Rule, name: str, exact: Sequence[Tensor]) -> None:
        self.name, self._steps = name, 0
        self._codecs: list[Codec] = [state_format(name)[slot.kind] for slot in rule.slots]
        numel = exact[0].numel()
        self._buffers = [codec.allocate(numel, exact[0].device) for codec in self._codecs]
        self._store(exact)

    def _store(self, values: Sequence[Tensor]) -> None:
        for number, (codec, buffers, value) in enumerate(
            zip(self._codecs, self._buffers, values, strict=True)
        ):
            numbers = None
            if codec.stochastic:
                key = random.keys(
                    np.array([_SEED], np.uint64),
                    np.array([number], np.uint64),
                    1,
                    np.array([float(self._steps)]),
                )[0, 0].tolist()
                numbers = random.numbers(key, 0, value.numel(), value.device)
            codec.store(value.reshape(-1), buffers, numbers)

    def values(self, like: Tensor) -> list[Tensor]:
        """What the next step will decode."""
        return [
            codec.load(buffers, like.numel()).view_as(like)
            for codec, buffers in zip(self._codecs, self._buffers, strict=True)
        ]

    def advance(self, batch: _Batch, h: Mapping[str, Any], stepped: Tensor | None) -> None:
        """Take the step that the batch takes."""
        self._steps += 1
        old = self.values(batch.grad)
        new, _ = batch.rule.step(old, batch.grad, batch.weight, h)
        self._store(_where(stepped, new, old))


class _Batch:
    """The sampled blocks of all parameters of one rule on one device, as rows of ``[rows, size]`` tensors."""

    def __init__(self, rule: Rule, members: list[_Member], size: int, device: torch.device) -> None:
        self.rule, self.members, self.size = rule, members, size
        rows = members[-1].stop
        self.grad = torch.zeros(rows, size, device=device)
        self.weight = torch.zeros(rows, size, device=device)
        self.exact: list[Tensor] = [torch.zeros(rows, size, device=device) for _ in rule.slots]
        counts = [member.stop - member.start for member in members]
        self._owner = np.repeat(np.arange(len(members)), counts)
        self.owner = torch.from_numpy(self._owner).to(device)
        self.scale = torch.tensor(
            [m.numel / (len(m.blocks) * size) for m in members], dtype=torch.float64, device=device
        )

    def decide(self, decision: Tensor, stepped: Tensor | None) -> Tensor:
        """Clip and unscale the gradients as the step did; which rows were stepped if it was not skipped."""
        clip, unscale, skipped = (decision[DECISION.index(name)] for name in ("clip", "unscale", "skipped"))
        # Non-finite elements count as zero, or the step is skipped, or the factor is NaN.
        self.grad.nan_to_num_(0.0, 0.0, 0.0).mul_((clip * unscale).to(self.grad))
        taken = (skipped == 0).to(self.grad.device)
        return taken.expand(len(self.grad), 1) if stepped is None else stepped & taken

    def columns(self, maths: Sequence[Math]) -> dict[str, Any]:
        """The scalars of the newest step, one for each row."""
        values = scalars([maths[m.group] for m in self.members], [m.step for m in self.members])
        table = torch.from_numpy(values[self._owner].T.copy()).to(self.grad.device, non_blocking=True)
        return {name: column[:, None] for name, column in zip(self.rule.scalars, table, strict=True)}

    def sums(self, exact: Sequence[Tensor], stored: Sequence[Tensor], h: Mapping[str, Any]) -> Tensor:
        """Full rows ``[members, columns]``: errors of ``stored`` against ``exact``, scaled up to the tensors."""
        u_exact = self.rule.update(exact, self.grad, h)
        u_stored = self.rule.update(stored, self.grad, h)
        zero = torch.zeros(len(self.grad), device=self.grad.device)
        cells = dict.fromkeys(TENSOR_FIELDS, zero)
        cells["update_sq"], cells["update_error_sq"] = _squares(u_exact), _squares(u_stored - u_exact)
        columns = list(cells.values())
        for slot, x, y in zip(self.rule.slots, exact, stored, strict=True):
            a, b = (x.sqrt(), y.sqrt()) if slot.kind is Kind.SECOND_MOMENT else (x, y)
            known = {"error_sq": _squares(a - b), "exact_sq": _squares(a)}
            columns += [known.get(field, zero) for field in SLOT_FIELDS]
        table = torch.stack(columns, 1).double()
        rows = table.new_zeros(len(self.members), table.shape[1]).index_add_(0, self.owner, table)
        return rows * self.scale[:, None]


class Blocks:
    """Sampled blocks of one optimizer.

    Args:
        adapter: reads its state.
        fraction: the share of blocks, of every tensor with quantised state, at least one.
        keep: whether the fp32 state is kept from step to step (a shadow) or taken anew each time (an estimate).
        what_if: names of storage formats to compare; only with ``keep``.
    """

    def __init__(self, adapter: Adapter, fraction: float, *, keep: bool, what_if: Sequence[str] = ()) -> None:
        self._adapter, self._fraction, self.keep, self._what_if = adapter, fraction, keep, tuple(what_if)
        self._batches: list[_Batch] = []
        self._others: list[list[_WhatIf]] = []
        self._parameters = 0  # that had state when the blocks were drawn
        self._fresh = False
        self.formats: tuple[str, ...] = ()  # of each table: the stored one, then those of what_if
        self.layouts: tuple[StatsLayout, ...] = ()  # of each batch

    # --- the two halves of a step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer, full: bool) -> None:
        """Take the weights, and for an estimate the state, as the step will find them."""
        if not self.keep and not full:
            return
        if not self._batches and not self.keep:
            self._draw(optimizer)
        params = parameters(optimizer)
        for batch in self._batches:
            for member in batch.members:
                _gather(batch.weight, member, local(params[member.index][0]))
            if not self.keep:
                self._load(batch, params, optimizer, batch.exact)

    @torch.no_grad()
    def after(
        self, optimizer: torch.optim.Optimizer, full: bool, decision: Tensor | None = None
    ) -> list[list[Tensor]]:
        """Take the step; if ``full`` the rows of each batch, for each of the formats.

        ``decision``: what one of ours decided in the step, see ``optwatch.kernels.plan.DECISION``.
        """
        if not self.keep and not full:
            return []
        params = parameters(optimizer)
        if self.keep and sum(bool(state) for _, state, _ in params) != self._parameters:
            self._draw(optimizer)
        maths = maths_of(self._adapter, optimizer)
        if maths is None:
            return []
        made = []
        for batch, others in zip(self._batches, self._others, strict=True):
            stepped = self._follow(batch, params, optimizer)
            if decision is not None:
                stepped = batch.decide(decision, stepped)
            h = batch.columns(maths)
            new, _ = batch.rule.step(batch.exact, batch.grad, batch.weight, h)
            exact = _where(stepped, new, batch.exact)
            for other in others:
                other.advance(batch, h, stepped)
            if self.keep:
                batch.exact = list(exact)
            if full:
                stored = [torch.empty_like(value) for value in exact]
                self._load(batch, params, optimizer, stored)
                made.append(
                    [
                        batch.sums(exact, values, h)
                        for values in (stored, *(o.values(batch.grad) for o in others))
                    ]
                )
        return made

    # --- drawing ----------------------------------------------------------------------------------------------------

    def _draw(self, optimizer: torch.optim.Optimizer) -> None:
        """Draw blocks of every parameter, if any is quantised; a shadow of a state that is not new starts from it."""
        params = parameters(optimizer)
        self._batches, self._others = [], []
        self._parameters = sum(bool(state) for _, state, _ in params)
        maths = maths_of(self._adapter, optimizer)
        if maths is None:
            return
        chosen: dict[tuple[str, torch.device], list[tuple[int, list[Stored]]]] = {}
        names: set[str] = set()
        for index, (param, state, group) in enumerate(params):
            slots = self._adapter.slots(optimizer, local(param), state) if state else []
            if state and {s.name for s in slots} >= {s.name for s in maths[group].rule.slots}:
                # Tensors kept in fp32, too: a group's error is that of all its elements.
                chosen.setdefault((maths[group].rule.name, param.device), []).append((index, slots))
                names |= {slot.format for slot in slots if not slot.exact}
        if not names:
            return
        for (_, device), entries in chosen.items():
            size = math.lcm(SIZE, *(slot.block for _, slots in entries for slot in slots))
            members = self._members(params, entries, size, device)
            if members:
                batch = _Batch(maths[members[0].group].rule, members, size, device)
                self._begin(batch, params, optimizer)
                self._batches.append(batch)
                self._others.append([_WhatIf(batch.rule, name, batch.exact) for name in self._what_if])
        self.formats = (_name(optimizer, names), *self._what_if)
        self.layouts = tuple(self._layout(batch) for batch in self._batches)

    def _members(
        self,
        params: Sequence[Parameter],
        entries: Sequence[tuple[int, list[Stored]]],
        size: int,
        device: torch.device,
    ) -> list[_Member]:
        members: list[_Member] = []
        for index, _ in entries:
            param, state, group = params[index]
            whole = local(param).numel() // size
            if not whole:
                continue
            count = min(whole, max(1, round(whole * self._fraction)))
            rng = np.random.default_rng((_SEED, index))
            blocks = torch.from_numpy(np.sort(rng.choice(whole, count, replace=False))).to(device)
            start = members[-1].stop if members else 0
            members.append(
                _Member(
                    index,
                    group,
                    local(param).numel(),
                    blocks,
                    start,
                    start + count,
                    step_of(state, 0.0) or 0.0,
                    _mark(state),
                )
            )
        return members

    def _begin(self, batch: _Batch, params: Sequence[Parameter], optimizer: torch.optim.Optimizer) -> None:
        """The state before the newest step if that was the first, else the one stored now."""
        self._load(batch, params, optimizer, batch.exact)
        for member in batch.members:
            if member.step != 1 or not self.keep:
                continue
            group = optimizer.param_groups[member.group]
            for slot, exact in zip(batch.rule.slots, batch.exact, strict=True):
                exact[member.start : member.stop] = float(group[slot.initial]) if slot.initial else 0.0
            member.step = 0.0
            _gather(batch.weight, member, local(params[member.index][0]))

    def _layout(self, batch: _Batch) -> StatsLayout:
        return StatsLayout(
            indices=tuple(m.index for m in batch.members),
            numel=tuple(m.numel for m in batch.members),
            slots=tuple(slot.name for slot in batch.rule.slots),
            second_moments=tuple(slot.kind is Kind.SECOND_MOMENT for slot in batch.rule.slots),
            codecs=(),
            backend=self._adapter.name,
        )

    # --- following --------------------------------------------------------------------------------------------------

    def _follow(
        self, batch: _Batch, params: Sequence[Parameter], optimizer: torch.optim.Optimizer
    ) -> Tensor | None:
        """Take the gradients; the rows that were stepped, as a column, or None if all were."""
        stepped = []
        for member in batch.members:
            param, state, _ = params[member.index]
            step = step_of(state, member.step + 1)
            stepped.append(param.grad is not None and step is not None and step != member.step)
            if stepped[-1]:
                member.step = step or 0.0
                _gather_flat(batch.grad, member, flat_gradient(param))
            if self.keep and member.mark != _mark(state):  # a checkpoint was loaded: start from what it holds
                member.mark, stepped[-1] = _mark(state), False
                self._load(batch, params, optimizer, batch.exact, member)
        if all(stepped):
            return None
        return torch.tensor(stepped).to(batch.owner.device, non_blocking=True)[batch.owner][:, None]

    def _load(
        self,
        batch: _Batch,
        params: Sequence[Parameter],
        optimizer: torch.optim.Optimizer,
        into: Sequence[Tensor],
        only: _Member | None = None,
    ) -> None:
        """Decode the stored state of the blocks."""
        for member in batch.members if only is None else [only]:
            param, state, _ = params[member.index]
            slots = {slot.name: slot for slot in self._adapter.slots(optimizer, local(param), state)}
            for slot, values in zip(batch.rule.slots, into, strict=True):
                values[member.start : member.stop] = slots[slot.name].take(member.blocks, batch.size)


def _mark(state: Mapping[str, Any]) -> tuple[int, ...]:
    """Which tensors the state is: others after a checkpoint was loaded. Step counters come and go."""
    return tuple(
        value.data_ptr() or id(value)  # a wrapper has no address
        for value in state.values()
        if isinstance(value, Tensor) and value.dim()
    )


def _gather(into: Tensor, member: _Member, param: Tensor) -> None:
    flat = flat_like(param, param)
    if flat is not None:
        _gather_flat(into, member, flat)


def _gather_flat(into: Tensor, member: _Member, flat: Tensor) -> None:
    into[member.start : member.stop] = take(flat, member.blocks, into.shape[1]).view(-1, into.shape[1])


def _where(stepped: Tensor | None, new: Sequence[Tensor], old: Sequence[Tensor]) -> Sequence[Tensor]:
    if stepped is None:
        return new
    return [torch.where(stepped, a, b) for a, b in zip(new, old, strict=True)]


def _squares(values: Tensor) -> Tensor:
    return values.square().sum(1)


def _name(optimizer: torch.optim.Optimizer, formats: set[str]) -> str:
    """The stored format, as it was asked for where it was."""
    own = isinstance(optimizer, Optimizer)
    asked = (
        {str(state) for group in optimizer.param_groups for state in formats_of(group)} if own else formats
    )
    return "+".join(sorted(asked))
