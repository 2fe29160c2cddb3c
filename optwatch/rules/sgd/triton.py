"""SGD as Triton functions; :mod:`optwatch.rules.sgd.rule` defines them.

Scalars ``h``, in the rules' order: grad_scale, l2, lr; and with momentum grad_scale, l2, momentum, fresh, direct,
through, lr.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.kernels.triton.functions import decayed, subtract


@triton.jit
def step(state, grad, weight, h, MATH: tl.constexpr):
    """No state, and lr*g with g the decayed gradient."""
    return (), decayed(grad, weight, h) * h[2]


@triton.jit
def update(state, grad, h, MATH: tl.constexpr):
    """The gradient times lr, without the decay's part of g."""
    return grad * h[0] * h[2]


@triton.jit
def momentum_step(state, grad, weight, h, MATH: tl.constexpr):
    """The new buffer, momentum*b + fresh*g with g the decayed gradient; the update from both."""
    g = decayed(grad, weight, h)
    buffer = tl.fma(g, h[3], state[0] * h[2])
    return (buffer,), tl.fma(g, h[4], buffer * h[5]) * h[6]


@triton.jit
def momentum_update(state, grad, h, MATH: tl.constexpr):
    """The update, lr*(direct*g + through*b), without the decay's part of g."""
    return tl.fma(grad * h[0], h[4], state[0] * h[5]) * h[6]


#: What the kernel calls, in this order, for each rule of the folder.
FUNCTIONS = {
    "sgd": (step, update, subtract),
    "sgd_momentum": (momentum_step, momentum_update, subtract),
}
