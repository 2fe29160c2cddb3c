"""Sophia-G as Triton functions; :mod:`optwatch.rules.sophiag.rule` defines them.

Scalars ``h``, in the rule's order: grad_scale, one_minus_beta1, beta2, fold_scale, curvature, lr, decay.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.kernels.triton.functions import fast_reciprocal, larger, smaller


@triton.jit
def step(state, grad, weight, h, MATH: tl.constexpr):
    """The new moment, m + (g-m)*(1-b1), and Hessian, b2*h + (fold_scale*g)**2; the clipped ratio of the two."""
    g = grad * h[0]
    folded = g * h[3]
    new = tl.fma(g - state[0], h[1], state[0]), tl.fma(folded, folded, state[1] * h[2])
    return new, update(new, grad, h, MATH)


@triton.jit
def update(state, grad, h, MATH: tl.constexpr):
    """The clipped ratio times lr: lr * clip(m / (curvature*h + 1e-15), -1, 1)."""
    ratio = state[0] * fast_reciprocal(tl.fma(state[1], h[4], 1e-15), MATH)
    return larger(smaller(ratio, 1.0), -1.0) * h[5]


@triton.jit
def apply(weight, update, h, MATH: tl.constexpr):
    """Decay, then the update."""
    return tl.fma(weight, h[6], -update)


#: What the kernel calls, in this order, for each rule of the folder.
FUNCTIONS = {"sophiag": (step, update, apply)}
