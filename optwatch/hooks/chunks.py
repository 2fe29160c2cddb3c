"""Full rows of an optimizer that is not ours, chunk by chunk in torch: on a GPU, and of what no compiled pass reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from optwatch.codecs import Kind
from optwatch.hooks.adapters import Stored
from optwatch.hooks.adapters.base import flat_like
from optwatch.hooks.maths import scalars
from optwatch.hooks.members import Stepped
from optwatch.metrics.fields import SLOT_FIELDS, TENSOR_FIELDS
from optwatch.optim.layout import flat_copy

#: Elements of a chunk. On a CPU a chunk of gradient, weight and two moments fits the second-level cache, sums in fp32
#: over it are exact to 1e-6, and torch works on it without other threads: waiting for them thousands of times takes
#: seconds where cores are busy. On a GPU launches are what costs.
CHUNK, DEVICE_CHUNK = 1 << 15, 1 << 22


def chunk_sums(stepped: Stepped) -> list[list[Tensor]]:
    """The sums of each chunk of one parameter, in the order of a row's columns."""
    member, slots, math, order = stepped.member, stepped.slots, stepped.math, stepped.order
    numbers: dict[str, float] = {}
    if math is not None:
        row = scalars([math], [stepped.step])[0]
        numbers = dict(zip(math.rule.scalars, row.tolist(), strict=True))
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
            if math is not None:
                update = math.rule.update([values[i] for i in order], grad, numbers)
                cells["update_sq"] = _square(update)
        elif start == 0:  # a sparse gradient has elements of its own
            cells["grad_sq"] = squares([member.grad])[0].float()
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


def squares(grads: Sequence[Tensor]) -> Tensor:
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
