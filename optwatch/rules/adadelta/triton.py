"""Adadelta as Triton functions; :mod:`optwatch.rules.adadelta.rule` defines them.

Scalars ``h``, in the rule's order: grad_scale, l2, rho, one_minus_rho, eps, lr.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.kernels.triton.functions import decayed, fast_rsqrt, fast_sqrt, subtract


@triton.jit
def step(state, grad, weight, h, MATH: tl.constexpr):
    """New averages of g*g and d*d, with g the decayed gradient and d = sqrt(a + eps) / sqrt(s + eps) * g; lr*d."""
    g = decayed(grad, weight, h)
    square_avg = tl.fma(g * h[3], g, state[0] * h[2])
    delta = fast_sqrt(state[1] + h[4], MATH) * fast_rsqrt(square_avg + h[4], MATH) * g
    acc_delta = tl.fma(delta * h[3], delta, state[1] * h[2])
    return (square_avg, acc_delta), delta * h[5]


@triton.jit
def update(state, grad, h, MATH: tl.constexpr):
    """The update, lr*g * sqrt((a + r*eps) / (r*(s + eps) + (1-r)*g*g)), without the decay's part of g."""
    g = grad * h[0]
    below = tl.fma(g * h[3], g, (state[0] + h[4]) * h[2])
    return fast_sqrt(tl.fma(h[2], h[4], state[1]), MATH) * fast_rsqrt(below, MATH) * g * h[5]


#: What the kernel calls, in this order, for each rule of the folder.
FUNCTIONS = {"adadelta": (step, update, subtract)}
