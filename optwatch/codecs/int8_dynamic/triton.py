"""The peers' map as Triton functions; :mod:`optwatch.codecs.int8_dynamic.codec` defines it.

The values of a decade are equally far apart, and as many as a power of two: the number of a value, with those of the
decades below counted, has its decade as the exponent and its place there as the mantissa. So both ways are arithmetic;
values agree with the map to a few units in the last place, and codes but where two values are as near as that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.codecs.base import Kind
from optwatch.kernels.triton.functions import (
    as_bits,
    as_float,
    block_max,
    fast_exp2,
    fast_log2,
    load_tile,
    per_element,
    reciprocal,
    store_tile,
    unit_product,
)

BLOCK = tl.constexpr(256)
SMALLEST = tl.constexpr(2.0**-126)
INFINITY = tl.constexpr(float("inf"))
LOG2_10 = tl.constexpr(3.321928094887362)
LOG10_2 = tl.constexpr(0.3010299956639812)
ONE_BITS = tl.constexpr(0x3F800000)
MANTISSA = tl.constexpr(0x7FFFFF)


@triton.jit
def value_of(number, SECOND: tl.constexpr, MATH: tl.constexpr):
    """The value that is not negative with this int32 number, 0 the value 0."""
    pattern = as_bits(number.to(tl.float32) + (SECOND + 0.5))
    decade = ((pattern >> 23) - (127 + 6 + SECOND)).to(tl.float32)  # the power of ten at its end
    place = as_float((pattern & MANTISSA) | ONE_BITS)  # of [1, 2)
    value = fast_exp2(decade * LOG2_10, MATH) * tl.fma(place, 0.9, -0.8)
    value = tl.where(number == 128 + 127 * SECOND, 1.0, value)
    return tl.where(number == 0, 0.0, value)


@triton.jit
def number_of(x, SECOND: tl.constexpr, MATH: tl.constexpr):
    """The number of the value nearest to x of [0, 1]."""
    decade = tl.floor(fast_log2(x, MATH) * LOG10_2)  # x is in [1, 10) * 10**decade
    decade = tl.minimum(tl.maximum(decade, -7.0), -1.0)
    count = fast_exp2(decade + (7 + SECOND), MATH)  # values in the decade
    inside = x * fast_exp2((decade + 1.0) * -LOG2_10, MATH)
    place = tl.fma(inside, 1 / 0.9, -1 / 9) * count
    # At its ends a decade has neighbours that are further away, below the first one 0 and above the last one 1.
    below = tl.where(decade == -7.0, 0.175 / 0.9, 0.2)
    last = tl.where((decade == -1.0) & (place >= count - 0.25), count, count - 1.0)
    at = tl.where(place < below, -1.0, tl.minimum(tl.floor(tl.maximum(place, 0.0)), count - 1.0))
    at = tl.where(last == count, count, at)
    return (count + at).to(tl.int32) - SECOND


@triton.jit
def load_any(
    codes,
    absmax,
    start,
    left,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    SECOND: tl.constexpr,
    MATH: tl.constexpr,
):
    """Decode a tile."""
    code = load_tile(codes, start, left, tl.uint8, TILE, MASKED).to(tl.int32)
    factor = load_tile(absmax, start // BLOCK, tl.cdiv(left, BLOCK), tl.float32, TILE // BLOCK, MASKED)
    return decode(code, SECOND, MATH) * per_element(factor, BLOCK)


@triton.jit
def decode(code, SECOND: tl.constexpr, MATH: tl.constexpr):
    """The values of int32 codes."""
    if SECOND:
        return value_of(code, 1, MATH)
    else:
        number = code - 127
        value = value_of(tl.abs(number), 0, MATH)
        return tl.where(number < 0, -value, value)


@triton.jit
def store_any(
    x, codes, absmax, start, left, TILE: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr, SECOND: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Encode a tile; if ``FULL``, returns what will be decoded and what is lost to zero. Nothing is cut off."""
    magnitude = tl.abs(x)
    largest = block_max(magnitude, BLOCK, MATH)
    finite = largest < INFINITY
    if SECOND:
        kept = finite & (largest > 0.0)
        largest = tl.maximum(largest, SMALLEST)
    else:
        kept = finite & (largest >= SMALLEST)
    inverse = tl.where(kept, reciprocal(tl.where(kept, largest, 1.0), MATH), 0.0)
    number = number_of(unit_product(magnitude, per_element(inverse, BLOCK), MATH), SECOND, MATH)
    if SECOND:
        zero = tl.where(finite, 0.0, INFINITY)  # up to which values take the code for zero
        code = tl.where(x > per_element(zero, BLOCK), tl.maximum(number, 1), 0)
    else:
        code = 127 + tl.where(x < 0.0, -tl.minimum(number, 127), number)
    store_tile(codes, start, left, code.to(tl.uint8), tl.uint8, TILE, MASKED)
    factor = tl.where(kept, largest, tl.where(finite, 0.0, float("nan")))
    store_tile(absmax, start // BLOCK, tl.cdiv(left, BLOCK), factor, tl.float32, TILE // BLOCK, MASKED)
    never = tl.zeros([TILE], tl.int1)
    if FULL:
        stored = decode(code, SECOND, MATH) * per_element(factor, BLOCK)
        return stored, (x != 0.0) & (stored == 0.0), never
    else:
        return x, never, never


@triton.jit
def load_signed(codes, absmax, start, left, TILE: tl.constexpr, MASKED: tl.constexpr, MATH: tl.constexpr):
    """Decode a tile of a signed slot."""
    return load_any(codes, absmax, start, left, TILE, MASKED, 0, MATH)


@triton.jit
def load_unsigned(codes, absmax, start, left, TILE: tl.constexpr, MASKED: tl.constexpr, MATH: tl.constexpr):
    """Decode a tile of second moments."""
    return load_any(codes, absmax, start, left, TILE, MASKED, 1, MATH)


@triton.jit
def store_signed(
    x, codes, absmax, start, left, key0, key1, TILE: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Encode a tile of a signed slot."""
    return store_any(x, codes, absmax, start, left, TILE, MASKED, FULL, 0, MATH)


@triton.jit
def store_unsigned(
    v, codes, absmax, start, left, key0, key1, TILE: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Encode a tile of second moments; only zero becomes zero."""
    return store_any(v, codes, absmax, start, left, TILE, MASKED, FULL, 1, MATH)


#: The functions ``(load, store)`` for each kind of slot.
FUNCTIONS = {
    Kind.SIGNED: (load_signed, store_signed),
    Kind.SECOND_MOMENT: (load_unsigned, store_unsigned),
}
