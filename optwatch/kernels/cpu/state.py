"""Sums over the state that another's optimizer keeps: one pass of the compiled library, every value read once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optwatch.kernels.cpu.library import MAX_BUFFERS, MAX_SLOTS, Library, library
from optwatch.kernels.cpu.sums import TYPES
from optwatch.kernels.plan import Scalars
from optwatch.metrics.fields import row_length
from optwatch.rules import Rule

#: How the library calls the codecs of weights that are kept as they are.
_WEIGHTS = {torch.float32: b"fp32", torch.bfloat16: b"bf16"}


@dataclass(frozen=True)
class StateSpec:
    """What tensors that are summed in one call have in common."""

    codecs: tuple[str, ...]  # of each slot, as the library calls it
    second_moments: tuple[bool, ...]
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    rule: Rule | None = None  # that the update follows from
    order: tuple[int, ...] = ()  # which of the slots is the rule's first, second, ..


def can_sum(spec: StateSpec) -> bool:
    """Whether the library is there and reads all of this."""
    loaded = library()
    return (
        isinstance(loaded, Library)
        and len(spec.codecs) <= MAX_SLOTS
        and {spec.param_dtype, spec.grad_dtype} <= TYPES.keys()
        and all(loaded.has("codec", name) for name in spec.codecs)
        and (spec.rule is None or loaded.has("rule", spec.rule.name))
    )


def state_sums(
    spec: StateSpec,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    slots: Sequence[Sequence[Sequence[Tensor]]],
    scalars: Scalars | None = None,
) -> NDArray[np.float64]:
    """A row of full statistics of each tensor, float64 ``[n, row_length(slots)]``, from what a step has left.

    ``slots`` are the buffers of each slot of each tensor, as its codec lists them; ``scalars`` are those of the rule,
    fp32 ``[n, len(rule.scalars)]``. All tensors are on the CPU, contiguous and of as many elements in the same order.
    What only the step itself knows (the exact values before they were stored, the old weights) is 0, and so is
    ``update_sq`` without a rule. Of tensors that :func:`can_sum` is not true of the result is undefined.
    """
    loaded = library()
    assert isinstance(loaded, Library)
    n, count = len(params), len(spec.codecs)
    buffers = np.zeros((n, count, MAX_BUFFERS), np.uint64)
    for i, of_tensor in enumerate(slots):
        for s, arrays in enumerate(of_tensor):
            buffers[i, s, : len(arrays)] = [array.data_ptr() for array in arrays]
    numel = np.array([param.numel() for param in params], np.int64)
    at = np.array([[param.data_ptr() for param in params], [grad.data_ptr() for grad in grads]], np.uint64)
    order, second = np.array(spec.order, np.intc), np.array(spec.second_moments, np.intc)
    rows = np.empty((n, row_length(count)))
    rule = None if spec.rule is None else spec.rule.name.encode()
    handle = loaded.c.optwatch_cpu_bind_state(
        loaded.isa.encode(),
        rule,
        order.ctypes.data,
        count,
        second.ctypes.data,
        (ctypes.c_char_p * count)(*(name.encode() for name in spec.codecs)),
        _WEIGHTS[spec.param_dtype],
        TYPES[spec.grad_dtype],
        n,
        numel.ctypes.data,
        at[0].ctypes.data,
        buffers.ctypes.data,
    )
    try:
        numbers = None if scalars is None else np.ascontiguousarray(scalars, np.float32)
        loaded.c.optwatch_cpu_run_state(
            handle,
            at[1].ctypes.data,
            None if numbers is None else numbers.ctypes.data,
            torch.get_num_threads(),
            rows.ctypes.data,
        )
    finally:
        loaded.c.optwatch_cpu_free(handle)
    return rows
