"""Adagrad as Triton functions; :mod:`optwatch.rules.adagrad.rule` defines them.

Scalars ``h``, in the rule's order: grad_scale, l2, eps, step_size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.kernels.triton.functions import decayed, fast_reciprocal, fast_sqrt, subtract


@triton.jit
def step(state, grad, weight, h, MATH: tl.constexpr):
    """The new sum, s + g*g with g the decayed gradient, and g over its root."""
    g = decayed(grad, weight, h)
    total = tl.fma(g, g, state[0])
    return (total,), over_root(total, g, h, MATH)


@triton.jit
def update(state, grad, h, MATH: tl.constexpr):
    """step_size * g / (sqrt(s) + eps), without the decay's part of g."""
    return over_root(state[0], grad * h[0], h, MATH)


@triton.jit
def over_root(total, g, h, MATH: tl.constexpr):
    """step_size * g / (sqrt(s) + eps)."""
    return g * fast_reciprocal(fast_sqrt(total, MATH) + h[2], MATH) * h[3]


#: What the kernel calls, in this order, for each rule of the folder.
FUNCTIONS = {"adagrad": (step, update, subtract)}
