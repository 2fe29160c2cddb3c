"""The 4-bit formats as Triton functions; :mod:`optwatch.codecs.int4.codec` defines them."""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.codecs.base import Kind
from optwatch.codecs.int4.codec import MIDDLES
from optwatch.kernels.triton.functions import (
    as_bits,
    as_float,
    block_max,
    block_min,
    fast_exp2,
    fast_log2,
    fast_reciprocal,
    fast_sqrt,
    load_nibbles,
    load_pairs,
    load_tile,
    per_element,
    random16,
    reciprocal,
    store_nibbles,
    store_pairs,
    store_tile,
    unit_product,
)

POWER = tl.constexpr(64)  # elements of a block
LOG = tl.constexpr(256)
SMALLEST = tl.constexpr(2.0**-126)
LARGEST = tl.constexpr(3.4028234663852886e38)
LARGEST_SCALE = tl.constexpr(0x7F7C0000)
INFINITY = tl.constexpr(float("inf"))
LAST = tl.constexpr(13)
SMALLEST_STEP = tl.constexpr(2.0**-10)
#: Between the levels of 0, 1 … 8, for each power.
MIDDLE = tl.constexpr(tuple(tuple(row) for row in MIDDLES.tolist()))


@triton.jit
def block_sum(x, BLOCK: tl.constexpr):
    """The sum of every ``BLOCK`` elements of a tile."""
    return tl.sum(tl.reshape(x, [x.shape[0] // BLOCK, BLOCK]), 1)


@triton.jit
def choose(index, a, b, c, d):
    """The one of four with this number."""
    return tl.where(index < 2, tl.where(index == 0, a, b), tl.where(index == 2, c, d))


@triton.jit
def power_values(code, head, MATH: tl.constexpr):
    """The values of int32 codes, of blocks whose scales are kept as ``head``."""
    scale = as_float((head & -4) << 16)
    power = choose(head & 3, 1.5, 2.0, 3.0, 4.5)
    negative = code > 8
    level = tl.where(negative, 16 - code, code).to(tl.float32)
    octaves = (fast_log2(level, MATH) - 3.0) * per_element(power, POWER)  # minus infinity for level 0
    value = fast_exp2(octaves, MATH) * per_element(scale, POWER)
    return tl.where(negative, -value, value)


@triton.jit
def load_power(codes, scale, start, left, TILE: tl.constexpr, MASKED: tl.constexpr, MATH: tl.constexpr):
    """Decode a tile: sign(code) * |code / 8|**p * scale."""
    code = load_nibbles(codes, start, left, TILE, MASKED)
    blocks = tl.cdiv(left, POWER)
    head = load_tile(scale, start // POWER, blocks, tl.int16, TILE // POWER, MASKED).to(tl.int32)
    return power_values(code, head, MATH)


@triton.jit
def rounded(magnitude):
    """The bits of a scale."""
    return tl.minimum((as_bits(magnitude) + (1 << 17)) & -(1 << 18), LARGEST_SCALE)


@triton.jit
def store_power(
    x, codes, scale, start, left, key0, key1, TILE: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Encode a tile; if ``FULL``, returns what will be decoded, what is lost to zero, and what is cut off."""
    magnitude = tl.abs(x)
    largest = block_max(magnitude, POWER, MATH)
    finite = largest < INFINITY
    kept = finite & (largest >= SMALLEST)
    highest = block_max(tl.where(x > 0.0, magnitude, 0.0), POWER, MATH)
    lowest = block_max(tl.where(x < 0.0, magnitude, 0.0), POWER, MATH)
    mean = block_sum(magnitude, POWER) * (1 / 64)
    index = (mean < largest * 0.22).to(tl.int32) + (mean < largest * 0.14).to(tl.int32)
    index = tl.where(finite, index + (mean < largest * 0.08).to(tl.int32), 0)
    bits = rounded(tl.where(kept, largest, 1.0))
    flipped = kept & (rounded(highest) < rounded(lowest))  # the scale is negative

    inverse = tl.where(kept, reciprocal(as_float(bits), MATH), 0.0)
    scaled = unit_product(magnitude, per_element(inverse, POWER), MATH)
    level = tl.zeros([TILE], tl.int32)
    for k in tl.static_range(8):
        middle = choose(index, MIDDLE[0][k], MIDDLE[1][k], MIDDLE[2][k], MIDDLE[3][k])
        level = tl.where(scaled > per_element(middle, POWER), level + 1, level)
    sign = as_bits(x) ^ per_element(tl.where(flipped, -2147483648, 0), POWER)
    code = tl.where(sign < 0, -tl.minimum(level, 7), level) & 15
    store_nibbles(codes, start, left, code, TILE, MASKED)

    head = tl.where(kept, (bits >> 16) | tl.where(flipped, -32768, 0), 0) | index
    head = tl.where(finite, head, 0x7FC0)
    blocks = tl.cdiv(left, POWER)
    store_tile(scale, start // POWER, blocks, head.to(tl.int16), tl.int16, TILE // POWER, MASKED)
    if FULL:
        stored = power_values(code, head, MATH)
        limit = tl.where(kept, as_float(bits) * (1 + 2.0**-6), INFINITY)
        return stored, (x != 0.0) & (stored == 0.0), magnitude > per_element(limit, POWER)
    else:
        return x, tl.zeros([TILE], tl.int1), tl.zeros([TILE], tl.int1)


@triton.jit
def log_values(code, lowest, step, MATH: tl.constexpr):
    """The values of int32 codes on the grids of their blocks."""
    wide = per_element(step, LOG)
    value = per_element(lowest, LOG) * fast_exp2(tl.fma(code.to(tl.float32), wide, -wide), MATH)
    value = tl.where(value > LARGEST, LARGEST, value)  # the last bits may go beyond it; NaN stays
    return tl.where(code == 0, 0.0, value)


@triton.jit
def load_log(codes, grid, start, left, TILE: tl.constexpr, MASKED: tl.constexpr, MATH: tl.constexpr):
    """Decode a tile: lowest * 2**((code - 1) * step), and 0 for code 0."""
    code = load_nibbles(codes, start, left, TILE, MASKED)
    lowest, step = load_pairs(grid, start, left, LOG, TILE, MASKED)
    return log_values(code, lowest, step, MATH)


@triton.jit
def store_log(
    v, codes, grid, start, left, key0, key1, TILE: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Encode a tile, rounding stochastically; returns what will be decoded. Nothing is ever lost or cut off."""
    largest = block_max(v, LOG, MATH)
    finite = largest < INFINITY
    kept = finite & (largest > 0.0)
    high = tl.maximum(tl.where(kept, largest, 1.0), SMALLEST)
    some = (v > 0.0) & per_element(finite, LOG)
    octaves = fast_log2(v * per_element(reciprocal(high, MATH), LOG), MATH)
    octaves = tl.where(some, tl.maximum(octaves, -126.0), 0.0)
    share = fast_reciprocal(tl.maximum(block_sum(some.to(tl.float32), LOG), 1.0), MATH)
    mean = block_sum(octaves, LOG) * share
    apart = tl.where(some, octaves - per_element(mean, LOG), 0.0)
    deviation = fast_sqrt(block_sum(apart * apart, LOG) * share, MATH)
    low = tl.maximum(block_min(octaves, LOG), mean - 2.0 * deviation)
    step = tl.maximum(low * (-1 / 14), SMALLEST_STEP)

    position = (octaves - per_element(low, LOG)) * per_element(fast_reciprocal(step, MATH), LOG)
    position = tl.maximum(position, 0.0)
    below = tl.minimum(position.to(tl.int32), LAST)
    chance = (position - below.to(tl.float32)) * 65536.0
    up = random16(start, key0, key1, TILE).to(tl.float32) + 0.5 < chance
    code = tl.where(some, tl.where(up, below + 2, below + 1), per_element(tl.where(finite, 0, 1), LOG))
    store_nibbles(codes, start, left, code, TILE, MASKED)

    lowest = tl.maximum(high * fast_exp2(low, MATH), SMALLEST)
    lowest = tl.where(kept, lowest, tl.where(finite, 0.0, float("nan")))
    step = tl.where(kept, step, tl.where(finite, 0.0, float("nan")))
    store_pairs(grid, start, left, lowest, step, LOG, TILE, MASKED)
    never = tl.zeros([TILE], tl.int1)
    if FULL:
        return log_values(code, lowest, step, MATH), never, never
    else:
        return v, never, never


#: The functions ``(load, store)`` for each kind of slot.
FUNCTIONS = {Kind.SIGNED: (load_power, store_power), Kind.SECOND_MOMENT: (load_log, store_log)}
