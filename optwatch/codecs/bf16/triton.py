"""bfloat16 as Triton functions; :mod:`optwatch.codecs.bf16.codec` defines them."""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.codecs.base import Kind
from optwatch.kernels.triton.functions import as_bits, as_float, load_tile, random16, store_tile, to_type

LARGEST = tl.constexpr(3.3895313892515355e38)  # the largest finite bfloat16
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def load(values, unused, start, left, TILE: tl.constexpr, MASKED: tl.constexpr, MATH: tl.constexpr):
    """Read a tile and widen it."""
    return load_tile(values, start, left, tl.bfloat16, TILE, MASKED).to(tl.float32)


@triton.jit
def store(
    x, values, unused, start, left, key0, key1, TILE: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Round to nearest even; returns the rounded values, which are lost to zero, and which are cut off."""
    magnitude = tl.abs(x)
    beyond = (magnitude > LARGEST) & (magnitude < INFINITY)
    stored = to_type(tl.where(beyond, tl.where(x < 0, -LARGEST, LARGEST), x), tl.bfloat16, MATH)
    store_tile(values, start, left, stored, tl.bfloat16, TILE, MASKED)
    stored = stored.to(tl.float32)
    return stored, (x != 0.0) & (stored == 0.0), beyond


@triton.jit
def store_stochastic(
    v, values, unused, start, left, key0, key1, TILE: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Round non-negative values stochastically; returns the same as :func:`store`."""
    finite = v < INFINITY
    rounded = as_float((as_bits(v) + random16(start, key0, key1, TILE)) & -65536)
    rounded = tl.where(finite, tl.minimum(rounded, LARGEST), v).to(tl.bfloat16)
    store_tile(values, start, left, rounded, tl.bfloat16, TILE, MASKED)
    rounded = rounded.to(tl.float32)
    return rounded, (v != 0.0) & (rounded == 0.0), finite & (v > LARGEST)


#: The functions ``(load, store)`` for each kind of slot.
FUNCTIONS = {Kind.SIGNED: (load, store), Kind.SECOND_MOMENT: (load, store_stochastic)}
