"""RMSprop as Triton functions; :mod:`optwatch.rules.rmsprop.rule` defines them.

State in the rule's order: the buffer where there is momentum, the mean where it is centered, the mean square.

Scalars ``h``, in the rule's order: grad_scale, l2, alpha, one_minus_alpha, odds, eps, momentum, lr.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.kernels.triton.functions import decayed, fast_reciprocal, fast_sqrt, larger, subtract


@triton.jit
def plain_step(state, grad, weight, h, MATH: tl.constexpr):
    """The new mean square, and lr times the normalised gradient."""
    g = decayed(grad, weight, h)
    square = mean_square(state[0], g, h)
    return (square,), normalised(square, g, h, MATH) * h[7]


@triton.jit
def plain_update(state, grad, h, MATH: tl.constexpr):
    """The rate times the normalised gradient, without the decay's part of it."""
    return normalised(state[0], grad * h[0], h, MATH) * h[7]


@triton.jit
def centered_step(state, grad, weight, h, MATH: tl.constexpr):
    """The new mean and mean square, and lr times the normalised gradient."""
    g = decayed(grad, weight, h)
    mean = tl.fma(g - state[0], h[3], state[0])
    square = mean_square(state[1], g, h)
    return (mean, square), normalised(variance(mean, square, g, h), g, h, MATH) * h[7]


@triton.jit
def centered_update(state, grad, h, MATH: tl.constexpr):
    """The rate times the normalised gradient, without the decay's part of it."""
    g = grad * h[0]
    return normalised(variance(state[0], state[1], g, h), g, h, MATH) * h[7]


@triton.jit
def momentum_step(state, grad, weight, h, MATH: tl.constexpr):
    """The new buffer, b*momentum + the normalised gradient, and mean square; lr*b."""
    g = decayed(grad, weight, h)
    square = mean_square(state[1], g, h)
    buffer = tl.fma(state[0], h[6], normalised(square, g, h, MATH))
    return (buffer, square), buffer * h[7]


@triton.jit
def centered_momentum_step(state, grad, weight, h, MATH: tl.constexpr):
    """The new buffer, b*momentum + the normalised gradient, mean and mean square; lr*b."""
    g = decayed(grad, weight, h)
    mean = tl.fma(g - state[1], h[3], state[1])
    square = mean_square(state[2], g, h)
    buffer = tl.fma(state[0], h[6], normalised(variance(mean, square, g, h), g, h, MATH))
    return (buffer, mean, square), buffer * h[7]


@triton.jit
def momentum_update(state, grad, h, MATH: tl.constexpr):
    """The buffer times lr."""
    return state[0] * h[7]


@triton.jit
def mean_square(square, g, h):
    """The new mean square, a*s + (1-a)*g*g."""
    return tl.fma(g * h[3], g, square * h[2])


@triton.jit
def variance(mean, square, g, h):
    """The variance of g, s - m*m, but at least odds * (g - m)**2."""
    away = g - mean
    return larger(square - mean * mean, away * away * h[4])


@triton.jit
def normalised(square, g, h, MATH: tl.constexpr):
    """The normalised gradient, g / (sqrt(s) + eps)."""
    return g * fast_reciprocal(fast_sqrt(square, MATH) + h[5], MATH)


#: What the kernel calls, in this order, for each rule of the folder.
FUNCTIONS = {
    "rmsprop": (plain_step, plain_update, subtract),
    "rmsprop_centered": (centered_step, centered_update, subtract),
    "rmsprop_momentum": (momentum_step, momentum_update, subtract),
    "rmsprop_centered_momentum": (centered_momentum_step, momentum_update, subtract),
}
