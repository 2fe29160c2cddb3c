"""The reference backend: eager torch on any device. It defines what every other backend must give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optwatch.codecs import Codec, Kind
from optwatch.kernels import random
from optwatch.kernels.plan import GRADIENT_SUMS, Combine, Keys, PlanSpec, PlanTensor, Scalars
from optwatch.metrics.fields import maximum_columns
from optwatch.rules import Rule

#: Elements worked on at once, a multiple of every codec's block: temporaries stay small however large the tensor.
CHUNK = 1 << 20


class ReferenceBackend:
    """Runs every plan on every device."""

    name = "reference"

    def why_not(self, spec: PlanSpec, device: torch.device) -> str | None:
        """There is nothing it cannot run."""
        return None

    def bind(
        self, spec: PlanSpec, tensors: Sequence[PlanTensor], combine: Combine | None = None
    ) -> ReferencePlan:
        """Keep the tensors."""
        return ReferencePlan(spec, tensors, combine)


class ReferencePlan:
    """A plan run tensor by tensor, chunk by chunk."""

    def __init__(self, spec: PlanSpec, tensors: Sequence[PlanTensor], combine: Combine | None = None) -> None:
        self.spec = spec
        self.tensors = tensors
        self._combine = combine
        self.device = tensors[0].param.device

    def sum_gradients(self, grads: Sequence[Tensor | None]) -> Tensor:
        """See :class:`optwatch.kernels.plan.BoundPlan`."""
        rows = torch.zeros(len(grads), len(GRADIENT_SUMS), dtype=torch.float64, device=self.device)
        for i, grad in enumerate(grads):
            for chunk in () if grad is None else grad.view(-1).split(CHUNK):
                finite = finite_or_zero(chunk.float())
                rows[i] += torch.stack([_sum_sq(chunk), (~chunk.isfinite()).sum().double(), _sum_sq(finite)])
        return rows

    def run(
        self, grads: Sequence[Tensor | None], scalars: Scalars, keys: Keys, full: bool, zero: bool = False
    ) -> Tensor:
        """See :class:`optwatch.kernels.plan.BoundPlan`."""
        if zero:
            grads = [grad if grad is None else finite_or_zero(grad) for grad in grads]
        if self.spec.rule.norms:
            scalars = concluded(self.spec.rule, scalars, self._sum_norms(grads, scalars))
        rows = torch.zeros(len(self.tensors), self.spec.columns, dtype=torch.float64, device=self.device)
        for i, (tensor, grad) in enumerate(zip(self.tensors, grads, strict=True)):
            if grad is None:
                continue
            h = dict(zip(self.spec.rule.scalars, scalars[i].tolist(), strict=True))
            for start in range(0, len(tensor.param), CHUNK):
                stop = min(start + CHUNK, len(tensor.param))
                row = self._step(tensor, grad.view(-1)[start:stop], start, stop, h, keys[i].tolist(), full)
                rows[i] = _merge(rows[i], row, len(self.spec.codecs))
        return rows

    def _sum_norms(self, grads: Sequence[Tensor | None], scalars: Scalars) -> Tensor:
        """The sums of squares of what the rule takes norms of, ``[n, norms]``."""
        rule, codecs = self.spec.rule, self.spec.codecs
        sums = torch.zeros(len(grads), len(rule.norms), dtype=torch.float64, device=self.device)
        for i, (tensor, grad) in enumerate(zip(self.tensors, grads, strict=True)):
            h = dict(zip(rule.scalars, scalars[i].tolist(), strict=True))
            if grad is None:
                continue
            for start in range(0, len(tensor.param), CHUNK):
                stop = min(start + CHUNK, len(tensor.param))
                state = [
                    codec.load(codec.cut(slot, start, stop), stop - start)
                    for codec, slot in zip(codecs, tensor.slots, strict=True)
                ]
                weight = self.spec.weight.load(self.spec.weight.cut(tensor.weight, start, stop))
                measured = rule.measure(state, grad.view(-1)[start:stop].float(), weight, h)
                sums[i] += torch.stack([_sum_sq(values) for values in measured])
        return sums if self._combine is None else self._combine(sums)

    def _step(
        self, tensor: PlanTensor, grad: Tensor, start: int, stop: int, h: dict[str, float], keys: list[list[int]],
        full: bool,
    ) -> Tensor:  # fmt: skip
        """One step on the elements ``[start, stop)`` of one tensor; the row of what happened there."""
        rule, codecs, weights = self.spec.rule, self.spec.codecs, self.spec.weight
        buffers = [codec.cut(slot, start, stop) for codec, slot in zip(codecs, tensor.slots, strict=True)]
        kept = weights.cut(tensor.weight, start, stop)
        weight = weights.load(kept).clone()
        grad = grad.float()

        def numbers(codec: Codec, key: list[int]) -> Tensor | None:
            return random.numbers(key, start, stop, self.device) if codec.stochastic else None

        old = [codec.load(buffer, stop - start) for codec, buffer in zip(codecs, buffers, strict=True)]
        exact, update = rule.step(old, grad, weight, h)
        exact_weight = rule.apply(weight, update, h)
        new_weight = weights.store(exact_weight, kept, numbers(weights, keys[-1]))
        stored = [
            codec.store(value, buffer, numbers(codec, key))
            for codec, buffer, value, key in zip(codecs, buffers, exact, keys[:-1], strict=True)
        ]

        fields = [_sum_sq(grad), (~grad.isfinite()).sum(), _sum_sq(update)]
        if full:
            fields += [
                _sum_sq(rule.update(stored, grad, h) - rule.update(exact, grad, h)),
                _sum_sq(new_weight),
                _sum(exact[0] * grad) if rule.compares_moment else torch.zeros(()),
                # A weight that might have moved, had the numbers been others, is none that its update cannot move.
                ((exact_weight if weights.stochastic else new_weight) == weight).sum(),
            ]
            for slot, codec, buffer, x, y in zip(rule.slots, codecs, buffers, exact, stored, strict=True):
                fields += slot_fields(slot.kind, codec.saturated(x, buffer), x, y)
        row = torch.stack([field.double() for field in fields])
        return torch.nn.functional.pad(row, (0, self.spec.columns - len(row)))


def concluded(rule: Rule, scalars: Scalars, sums: Tensor) -> Scalars:
    """``scalars`` with those that follow from the sums of squares of the rule's norms."""
    given = torch.from_numpy(scalars)
    found = rule.conclude(
        {name: given[:, i].double() for i, name in enumerate(rule.scalars)}, sums.cpu().unbind(1)
    )
    new: Scalars = scalars.copy()
    for name, values in found.items():
        new[:, rule.scalars.index(name)] = values.numpy()
    return new


def finite_or_zero(grad: Tensor) -> Tensor:
    """The gradient with zeros where it is NaN or infinite."""
    return torch.where(grad.isfinite(), grad, torch.zeros((), dtype=grad.dtype, device=grad.device))


def slot_fields(kind: Kind, saturated: Tensor, exact: Tensor, stored: Tensor) -> list[Tensor]:
    """The ``SLOT_FIELDS`` of flat fp32 ``exact`` values that are kept as ``stored``."""
    if kind is Kind.SECOND_MOMENT:
        error_sq, exact_sq = _sum_sq(exact.sqrt() - stored.sqrt()), _sum(exact)
    else:
        error_sq, exact_sq = _sum_sq(exact - stored), _sum_sq(exact)
    return [
        error_sq,
        exact_sq,
        _sum(exact),
        exact.abs().amax(),
        ((exact != 0) & (stored == 0)).sum(),
        saturated.sum(),
    ]


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64)


def _sum_sq(values: Tensor) -> Tensor:
    return values.double().square().sum()


def _merge(row: Tensor, other: Tensor, slots: int) -> Tensor:
    """Two rows of the same tensor as one."""
    maxima = torch.from_numpy(maximum_columns(slots)).to(row.device)
    return torch.where(maxima, torch.maximum(row, other), row + other)
