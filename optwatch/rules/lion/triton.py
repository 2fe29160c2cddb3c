"""Lion as Triton functions; :mod:`optwatch.rules.lion.rule` defines them.

Scalars ``h``, in the rule's order: grad_scale, one_minus_beta1, one_minus_beta2, moment_share, grad_share, lr, decay.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def step(state, grad, weight, h, MATH: tl.constexpr):
    """The new moment, m + (g-m)*(1-b2) with g the scaled gradient, and lr times the sign of another average."""
    away = tl.fma(grad, h[0], -state[0])
    return (tl.fma(away, h[2], state[0]),), signed(h[5], tl.fma(away, h[1], state[0]))


@triton.jit
def update(state, grad, h, MATH: tl.constexpr):
    """The sign, times lr, of b1/b2*m + (b2-b1)/b2*g."""
    return signed(h[5], tl.fma(state[0], h[3], grad * h[0] * h[4]))


@triton.jit
def signed(size, direction):
    """``size`` with the sign of ``direction``; 0 where that is 0 or NaN, as torch.sign has it."""
    return tl.where(direction > 0.0, size, tl.where(direction < 0.0, -size, 0.0))


@triton.jit
def apply(weight, update, h, MATH: tl.constexpr):
    """Decay, then the update."""
    return tl.fma(weight, h[6], -update)


#: What the kernel calls, in this order, for each rule of the folder.
FUNCTIONS = {"lion": (step, update, apply)}
