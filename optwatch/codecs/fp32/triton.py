"""fp32 as Triton functions; :mod:`optwatch.codecs.fp32.codec` defines them."""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.codecs.base import Kind
from optwatch.kernels.triton.functions import load_tile, store_tile


@triton.jit
def load(values, unused, start, left, TILE: tl.constexpr, MASKED: tl.constexpr, MATH: tl.constexpr):
    """Read a tile."""
    return load_tile(values, start, left, tl.float32, TILE, MASKED)


@triton.jit
def store(
    x, values, unused, start, left, key0, key1, TILE: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Write a tile; returns it. Nothing is ever lost or cut off."""
    store_tile(values, start, left, x, tl.float32, TILE, MASKED)
    never = tl.zeros([TILE], tl.int1)
    return x, never, never


#: The functions ``(load, store)`` for each kind of slot.
FUNCTIONS = {Kind.SIGNED: (load, store), Kind.SECOND_MOMENT: (load, store)}
