"""e4m3 as Triton functions; :mod:`optwatch.codecs.fp8.codec` defines them."""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.codecs.base import Kind
from optwatch.kernels.triton.functions import (
    as_bits,
    as_float,
    block_max,
    load_tile,
    per_element,
    random16,
    reciprocal,
    store_tile,
    unit_product,
)

BLOCK = tl.constexpr(256)
LARGEST = tl.constexpr(448.0)
NORMAL = tl.constexpr(2.0**-6)
FINEST = tl.constexpr(2.0**-117)
INFINITY = tl.constexpr(float("inf"))
SHIFT = tl.constexpr(20)  # mantissa bits of fp32 that e4m3 lacks
EXPONENTS = tl.constexpr(
    (127 - 7) << 3
)  # what the exponents of fp32 and e4m3 differ by, above three mantissa bits
INTEGERS = tl.constexpr(
    8388608.0
)  # 2**23: from here on fp32 numbers are the integers, their lower bits the value
INTEGERS_BITS = tl.constexpr(0x4B000000)


@triton.jit
def decode(code):
    """The values of int32 codes: their bits in place in an fp32 number, times what the exponents differ by."""
    magnitude = code & 127
    value = as_float(((code & 128) << 24) | (magnitude << SHIFT)) * 2.0**120
    return tl.where(magnitude == 127, float("nan"), value)


@triton.jit
def load(codes, scale, start, left, TILE: tl.constexpr, MASKED: tl.constexpr, MATH: tl.constexpr):
    """Decode a tile."""
    code = load_tile(codes, start, left, tl.uint8, TILE, MASKED).to(tl.int32)
    factor = load_tile(scale, start // BLOCK, tl.cdiv(left, BLOCK), tl.float32, TILE // BLOCK, MASKED)
    return decode(code) * per_element(factor, BLOCK)


@triton.jit
def rescale(x, scale, start, left, TILE: tl.constexpr, MASKED: tl.constexpr, MATH: tl.constexpr):
    """Write the scales; returns them and the tile's magnitudes over them, of [0, 448]."""
    magnitude = tl.abs(x)
    largest = block_max(magnitude, BLOCK, MATH)
    finite = largest < INFINITY
    kept = finite & (largest > 0.0)
    factor = tl.maximum(tl.div_rn(tl.where(kept, largest, LARGEST), LARGEST), FINEST)
    inverse = tl.where(kept, reciprocal(factor * LARGEST, MATH), 0.0)
    scaled = unit_product(magnitude, per_element(inverse, BLOCK), MATH) * LARGEST
    factor = tl.where(kept, factor, tl.where(finite, 0.0, float("nan")))
    store_tile(scale, start // BLOCK, tl.cdiv(left, BLOCK), factor, tl.float32, TILE // BLOCK, MASKED)
    return factor, scaled


@triton.jit
def finish(x, code, factor, codes, start, left, TILE: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr):
    """Write int32 codes; if ``FULL``, returns what will be decoded and what is lost to zero. Nothing is cut off."""
    store_tile(codes, start, left, code.to(tl.uint8), tl.uint8, TILE, MASKED)
    never = tl.zeros([TILE], tl.int1)
    if FULL:
        stored = decode(code) * per_element(factor, BLOCK)
        return stored, (x != 0.0) & (stored == 0.0), never
    else:
        return x, never, never


@triton.jit
def store(
    x, codes, scale, start, left, key0, key1, TILE: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Encode a tile, to nearest, ties to even."""
    factor, scaled = rescale(x, scale, start, left, TILE, MASKED, MATH)
    pattern = as_bits(scaled)
    normal = ((pattern + 0x7FFFF + ((pattern >> SHIFT) & 1)) >> SHIFT) - EXPONENTS
    small = as_bits(tl.fma(scaled, 512.0, INTEGERS)) - INTEGERS_BITS
    code = tl.where(scaled < NORMAL, small, normal)
    zeroed = per_element(tl.where(factor > 0.0, 128, 0), BLOCK)  # a block of zeros or of NaN has no signs
    code = code | ((as_bits(x) >> 24) & zeroed)
    return finish(x, code, factor, codes, start, left, TILE, MASKED, FULL)


@triton.jit
def store_stochastic(
    v, codes, scale, start, left, key0, key1, TILE: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Encode a tile of second moments, unbiased in the value; only zero becomes zero."""
    factor, scaled = rescale(v, scale, start, left, TILE, MASKED, MATH)
    random = random16(start, key0, key1, TILE)
    normal = tl.minimum(((as_bits(scaled) + (random << 4)) >> SHIFT) - EXPONENTS, 126)
    small = tl.fma(scaled, 512.0, random.to(tl.float32) * 2.0**-16).to(tl.int32)
    code = tl.maximum(tl.where(scaled < NORMAL, small, normal), 1)
    code = tl.where(scaled > 0.0, code, 0)
    return finish(v, code, factor, codes, start, left, TILE, MASKED, FULL)


#: The functions ``(load, store)`` for each kind of slot.
FUNCTIONS = {Kind.SIGNED: (load, store), Kind.SECOND_MOMENT: (load, store_stochastic)}
