"""LAMB as Triton functions; :mod:`optwatch.rules.lamb.rule` defines them. The step is AdamW's, by the ratio."""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.rules.adamw.triton import apply, step, update


@triton.jit
def measure(state, grad, weight, h, MATH: tl.constexpr):
    """The weight, and m/bc1 / (sqrt(v) * inv_sqrt_bc2 + eps) + weight_decay * weight from the new moments."""
    unit = h[0], h[1], h[2], h[3], h[4], h[8], h[6], h[7]
    _, direction = step(state, grad, weight, unit, MATH)
    return weight, tl.fma(weight, h[9], direction)


@triton.jit
def conclude(h, norms, MATH: tl.constexpr):
    """Step size and decay with the ratio of the norms, as rule.py has it."""
    ratio = tl.where((norms[0] > 0) & (norms[1] > 0), norms[0] / norms[1], 1.0)
    ratio = tl.where(h[11] > 0, tl.minimum(ratio, h[12]), 1.0)
    both = norms[0] + norms[1]
    ratio = tl.where(both == both, ratio, both)
    return h[0], h[1], h[2], h[3], h[4], h[5] * ratio, h[6], 1.0 - h[10] * h[9] * ratio


#: What the kernels call, in this order, for each rule of the folder.
FUNCTIONS = {"lamb": (step, update, apply, measure, conclude)}
