"""AMSGrad as Triton functions, for both rules it is made of; :mod:`optwatch.rules.amsgrad.rule` defines them.

Scalars ``h``: those of the rule that it is made of.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.kernels.triton.functions import larger, subtract
from optwatch.rules.adam import triton as adam
from optwatch.rules.adamw import triton as adamw


@triton.jit
def adam_step(state, grad, weight, h, MATH: tl.constexpr):
    """Adam's moments and the largest second one; the update from that."""
    moments, _ = adam.step((state[0], state[1]), grad, weight, h, MATH)
    new = moments[0], moments[1], larger(state[2], moments[1])
    return new, adam_update(new, grad, h, MATH)


@triton.jit
def adam_update(state, grad, h, MATH: tl.constexpr):
    """Adam's, from the largest v."""
    return adam.update((state[0], state[2]), grad, h, MATH)


@triton.jit
def adamw_step(state, grad, weight, h, MATH: tl.constexpr):
    """AdamW's moments and the largest second one; the update from that."""
    moments, _ = adamw.step((state[0], state[1]), grad, weight, h, MATH)
    new = moments[0], moments[1], larger(state[2], moments[1])
    return new, adamw_update(new, grad, h, MATH)


@triton.jit
def adamw_update(state, grad, h, MATH: tl.constexpr):
    """AdamW's, from the largest v."""
    return adamw.update((state[0], state[2]), grad, h, MATH)


#: What the kernel calls, in this order, for each rule of the folder.
FUNCTIONS = {
    "adam_amsgrad": (adam_step, adam_update, subtract),
    "adamw_amsgrad": (adamw_step, adamw_update, adamw.apply),
}
