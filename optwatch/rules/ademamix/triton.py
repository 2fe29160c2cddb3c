"""AdEMAMix as Triton functions; :mod:`optwatch.rules.ademamix.rule` defines them.

Scalars ``h``, in the rule's order: grad_scale, one_minus_beta1, one_minus_beta3, beta2, one_minus_beta2, eps,
step_size, slow_size, inv_sqrt_bc2, decay.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.kernels.triton.functions import fast_reciprocal, fast_sqrt


@triton.jit
def step(state, grad, weight, h, MATH: tl.constexpr):
    """New moments, the slow average like the fast one; the update from them."""
    g = grad * h[0]
    exp_avg = tl.fma(g - state[0], h[1], state[0])
    exp_avg_slow = tl.fma(g - state[1], h[2], state[1])
    exp_avg_sq = tl.fma(g * h[4], g, state[2] * h[3])
    new = exp_avg, exp_avg_slow, exp_avg_sq
    return new, update(new, grad, h, MATH)


@triton.jit
def update(state, grad, h, MATH: tl.constexpr):
    """(step_size*m + slow_size*n) / (sqrt(v) * inv_sqrt_bc2 + eps)."""
    mixed = tl.fma(state[0], h[6], state[1] * h[7])
    denominator = tl.fma(fast_sqrt(state[2], MATH), h[8], h[5])
    return mixed * fast_reciprocal(denominator, MATH)


@triton.jit
def apply(weight, update, h, MATH: tl.constexpr):
    """Decay, then the update."""
    return tl.fma(weight, h[9], -update)


#: What the kernel calls, in this order, for each rule of the folder.
FUNCTIONS = {"ademamix": (step, update, apply)}
