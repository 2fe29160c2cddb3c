"""AdamW as Triton functions; :mod:`optwatch.rules.adamw.rule` defines them.

Scalars ``h``, in the rule's order: grad_scale, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, inv_sqrt_bc2,
decay.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.kernels.triton.functions import fast_reciprocal, fast_sqrt


@triton.jit
def step(state, grad, weight, h, MATH: tl.constexpr):
    """New moments, m + (g-m)*(1-b1) and b2*v + (1-b2)*g*g with g the gradient times its scale; the update from them."""
    exp_avg = tl.fma(tl.fma(grad, h[0], -state[0]), h[1], state[0])
    exp_avg_sq = tl.fma(grad * (h[0] * h[0] * h[3]), grad, state[1] * h[2])
    new = exp_avg, exp_avg_sq
    return new, update(new, grad, h, MATH)


@triton.jit
def update(state, grad, h, MATH: tl.constexpr):
    """step_size * m / (sqrt(v) * inv_sqrt_bc2 + eps)."""
    denominator = tl.fma(fast_sqrt(state[1], MATH), h[6], h[4])
    return state[0] * h[5] * fast_reciprocal(denominator, MATH)


@triton.jit
def apply(weight, update, h, MATH: tl.constexpr):
    """Decay, then the update."""
    return tl.fma(weight, h[7], -update)


#: What the kernel calls, in this order, for each rule of the folder.
FUNCTIONS = {"adamw": (step, update, apply)}
