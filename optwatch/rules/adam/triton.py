"""Adam as Triton functions; :mod:`optwatch.rules.adam.rule` defines them.

Scalars ``h``, in the rule's order: grad_scale, l2, one_minus_beta1, beta2, one_minus_beta2, eps, step_size,
inv_sqrt_bc2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.kernels.triton.functions import decayed, fast_reciprocal, fast_sqrt, subtract


@triton.jit
def step(state, grad, weight, h, MATH: tl.constexpr):
    """New moments, m + (g-m)*(1-b1) and b2*v + (1-b2)*g*g with g the decayed gradient; the update from them."""
    g = decayed(grad, weight, h)
    exp_avg = tl.fma(g - state[0], h[2], state[0])
    exp_avg_sq = tl.fma(g * h[4], g, state[1] * h[3])
    new = exp_avg, exp_avg_sq
    return new, update(new, grad, h, MATH)


@triton.jit
def update(state, grad, h, MATH: tl.constexpr):
    """step_size * m / (sqrt(v) * inv_sqrt_bc2 + eps)."""
    denominator = tl.fma(fast_sqrt(state[1], MATH), h[7], h[5])
    return state[0] * h[6] * fast_reciprocal(denominator, MATH)


#: What the kernel calls, in this order, for each rule of the folder.
FUNCTIONS = {"adam": (step, update, subtract)}
