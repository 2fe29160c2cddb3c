"""Full rows of an optimizer that is not ours, by the compiled library."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optwatch.codecs import Kind
from optwatch.hooks.adapters.base import flat_like
from optwatch.hooks.maths import scalars
from optwatch.hooks.members import Stepped
from optwatch.kernels.cpu.state import StateSpec, can_sum, state_sums


def compiled_rows(
    stepped: Sequence[Stepped], positions: Sequence[int], rows: NDArray[np.float64]
) -> list[Stepped]:
    """Write the rows of all that the library reads to their ``positions`` in ``rows``; returns the rest."""
    calls: dict[StateSpec, list[int]] = defaultdict(list)
    weights = [flat_like(one.member.param, one.member.param) for one in stepped]
    for i, (one, weight) in enumerate(zip(stepped, weights, strict=True)):
        if weight is not None and (spec := _spec(one, weight)) is not None:
            calls[spec].append(i)
    done = set[int]()
    for spec, of in calls.items():
        if not can_sum(spec):
            continue
        chosen = [stepped[i] for i in of]
        maths = [one.math for one in chosen if one.math is not None]
        rows[[positions[i] for i in of]] = state_sums(
            spec,
            [weight for i in of if (weight := weights[i]) is not None],
            [one.member.grad for one in chosen],
            [[slot.arrays for slot in one.slots] for one in chosen],
            scalars(maths, [one.step for one in chosen]) if maths else None,
        )
        done.update(of)
    return [one for i, one in enumerate(stepped) if i not in done]


def _spec(one: Stepped, weight: Tensor) -> StateSpec | None:
    """What the library would have to read; None if it cannot."""
    grad, codecs = one.member.grad, [slot.codec for slot in one.slots]
    arrays = [weight, grad, *(array for slot in one.slots for array in slot.arrays)]
    if grad.numel() != weight.numel() or not all(map(_plain, arrays)):
        return None
    names = tuple(name for name in codecs if name is not None)
    if len(names) < len(codecs):
        return None
    return StateSpec(
        codecs=names,
        second_moments=tuple(slot.kind is Kind.SECOND_MOMENT for slot in one.slots),
        param_dtype=weight.dtype,
        grad_dtype=grad.dtype,
        rule=None if one.math is None else one.math.rule,
        order=one.order,
    )


def _plain(array: Tensor) -> bool:
    return (
        type(array) is Tensor
        and array.layout == torch.strided
        and array.device.type == "cpu"
        and array.is_contiguous()
    )
