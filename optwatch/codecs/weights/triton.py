"""Weight formats as Triton functions; :mod:`optwatch.codecs.weights.codec` defines them."""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.codecs.bf16.triton import INFINITY, LARGEST
from optwatch.kernels.triton.functions import (
    as_bits,
    as_float,
    copy_sign,
    load_tile,
    random16,
    store_tile,
    to_type,
)

NAN = tl.constexpr(0x7FC00000)


@triton.jit
def load_float32(values, unused, start, left, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Read a tile."""
    return load_tile(values, start, left, tl.float32, TILE, MASKED)


@triton.jit
def store_float32(
    x, values, unused, start, left, key0, key1, TILE: tl.constexpr, MASKED: tl.constexpr, MATH: tl.constexpr
):  # fmt: skip
    """Write a tile; returns what the next step will read, as the other stores do."""
    store_tile(values, start, left, x, tl.float32, TILE, MASKED)
    return x


@triton.jit
def upper_half(values):
    """The bits of bf16 ``values`` as those of fp32; what a conversion does, but for subnormals in the interpreter."""
    return values.to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def load_bfloat16(values, unused, start, left, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Read a tile and widen it."""
    return as_float(upper_half(load_tile(values, start, left, tl.bfloat16, TILE, MASKED)))


@triton.jit
def store_bfloat16(
    x, values, unused, start, left, key0, key1, TILE: tl.constexpr, MASKED: tl.constexpr, MATH: tl.constexpr
):  # fmt: skip
    """Round to nearest even."""
    rounded = to_type(x, tl.bfloat16, MATH)
    store_tile(values, start, left, rounded, tl.bfloat16, TILE, MASKED)
    return rounded.to(tl.float32)


@triton.jit
def store_stochastic(
    x, values, unused, start, left, key0, key1, TILE: tl.constexpr, MASKED: tl.constexpr, MATH: tl.constexpr
):  # fmt: skip
    """Round stochastically."""
    magnitude = tl.abs(x)
    rounded = as_float((as_bits(magnitude) + random16(start, key0, key1, TILE)) & -65536)
    rounded = tl.where(magnitude < INFINITY, copy_sign(tl.minimum(rounded, LARGEST), x), x)
    rounded = to_type(rounded, tl.bfloat16, MATH)
    store_tile(values, start, left, rounded, tl.bfloat16, TILE, MASKED)
    return rounded.to(tl.float32)


@triton.jit
def joined(values, corrections, LOST: tl.constexpr):
    """The numbers that these bf16 values and corrections make; a zero beside a negative correction is zero."""
    upper = upper_half(values)
    correction = corrections.to(tl.int32) << LOST
    return as_float(upper + tl.maximum(correction, -(upper & 0x7FFFFFFF)))


@triton.jit
def split(bits, values, corrections, start, left, LOST: tl.constexpr, TYPE: tl.constexpr, TILE: tl.constexpr,
          MASKED: tl.constexpr):  # fmt: skip
    """Write numbers, given by their bits, cut in two; returns what is left of them."""
    upper = ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    lower = (bits >> LOST).to(TYPE)
    store_tile(values, start, left, upper, tl.bfloat16, TILE, MASKED)
    store_tile(corrections, start, left, lower, TYPE, TILE, MASKED)
    return as_float(bits & -(1 << LOST))


@triton.jit
def load_split8(values, corrections, start, left, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Read a tile of bf16 values with 8 bits more."""
    upper = load_tile(values, start, left, tl.bfloat16, TILE, MASKED)
    return joined(upper, load_tile(corrections, start, left, tl.int8, TILE, MASKED), 8)


@triton.jit
def store_split8(
    x, values, corrections, start, left, key0, key1, TILE: tl.constexpr, MASKED: tl.constexpr, MATH: tl.constexpr
):  # fmt: skip
    """Round to 24 bits stochastically and write them."""
    bits = tl.where(x == x, as_bits(x) + (random16(start, key0, key1, TILE) >> 8), NAN)
    return split(bits, values, corrections, start, left, 8, tl.int8, TILE, MASKED)


@triton.jit
def load_split16(values, corrections, start, left, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Read a tile of bf16 values with 16 bits more."""
    upper = load_tile(values, start, left, tl.bfloat16, TILE, MASKED)
    return joined(upper, load_tile(corrections, start, left, tl.int16, TILE, MASKED), 0)


@triton.jit
def store_split16(
    x, values, corrections, start, left, key0, key1, TILE: tl.constexpr, MASKED: tl.constexpr, MATH: tl.constexpr
):  # fmt: skip
    """Write all 32 bits."""
    return split(
        tl.where(x == x, as_bits(x), NAN), values, corrections, start, left, 0, tl.int16, TILE, MASKED
    )


#: The functions ``(load, store)`` of each codec.
FUNCTIONS = {
    "native_float32": (load_float32, store_float32),
    "native_bfloat16": (load_bfloat16, store_bfloat16),
    "stochastic_bfloat16": (load_bfloat16, store_stochastic),
    "split8": (load_split8, store_split8),
    "split16": (load_split16, store_split16),
}
