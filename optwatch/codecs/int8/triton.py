"""The 8-bit formats as Triton functions; :mod:`optwatch.codecs.int8.codec` defines them."""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.codecs.base import Kind
from optwatch.kernels.triton.functions import (
    as_bits,
    as_float,
    block_max,
    block_min,
    copy_sign,
    fast_exp2,
    fast_log2,
    fast_reciprocal,
    floor_fma,
    load_pairs,
    load_tile,
    per_element,
    random16,
    reciprocal,
    store_pairs,
    store_tile,
    unit_product,
)

CUBIC = tl.constexpr(128)  # elements of a block
LOG = tl.constexpr(256)
UNIT = tl.constexpr(1 / 127**3)
SMALLEST = tl.constexpr(2.0**-126)
HIGHEST = tl.constexpr((2 - 2.0**-13) * 2.0**127)
LAST = tl.constexpr(1.75 * 2.0**127)
NARROW = tl.constexpr(2.0**-126)  # inverse of the widest range of a block
SMALLEST_STEP = tl.constexpr(2.0**-12)
INFINITY = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
LOG2_127 = tl.constexpr(6.988684686772166)
LN2 = tl.constexpr(0.6931471805599453)
# Adding this to a number of [-2**22, 2**22] leaves the number, rounded to nearest, in the lower bits.
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23
INTEGERS = tl.constexpr(
    8388608.0
)  # 2**23: from here on fp32 numbers are the integers, their lower bits the value
INTEGERS_BITS = tl.constexpr(0x4B000000)
BELOW_254 = tl.constexpr(253.99998474121094)  # the largest fp32 number below 254


@triton.jit
def load_cubic(codes, scale, start, left, TILE: tl.constexpr, MASKED: tl.constexpr, MATH: tl.constexpr):
    """Decode a tile: (code / 127)**3 * scale."""
    code = load_tile(codes, start, left, tl.int8, TILE, MASKED).to(tl.float32)
    blocks = tl.cdiv(left, CUBIC)
    factor = (
        load_tile(scale, start // CUBIC, blocks, tl.bfloat16, TILE // CUBIC, MASKED).to(tl.float32) * UNIT
    )
    return code * code * code * per_element(factor, CUBIC)


@triton.jit
def store_cubic(
    x, codes, scale, start, left, key0, key1, TILE: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Encode a tile; if ``FULL``, returns what will be decoded, what is lost to zero, and what is cut off."""
    magnitude = tl.abs(x)
    largest = block_max(magnitude, CUBIC, MATH)
    kept = (largest >= SMALLEST) & (largest < INFINITY)
    bits = tl.minimum((as_bits(largest) + 0xFFFF) & -65536, 0x7F7F0000)
    rounded = as_float(tl.where(kept, bits, 0x3F800000))
    # A factor of zero turns every magnitude of the other blocks, even NaN and infinity, into code 0.
    inverse = tl.where(kept, reciprocal(rounded, MATH), 0.0)
    relative = unit_product(magnitude, per_element(inverse, CUBIC), MATH)
    root = fast_exp2(tl.fma(fast_log2(relative, MATH), 1 / 3, LOG2_127), MATH)
    root = tl.maximum(tl.fma(fast_reciprocal(root, MATH), -0.25, root), 0.0)
    integer = copy_sign(root, x) + ROUND
    store_tile(codes, start, left, as_bits(integer).to(tl.int8), tl.int8, TILE, MASKED)
    value = tl.where(largest < SMALLEST, 0.0, tl.where(kept, rounded, NAN))
    blocks = tl.cdiv(left, CUBIC)
    store_tile(scale, start // CUBIC, blocks, value.to(tl.bfloat16), tl.bfloat16, TILE // CUBIC, MASKED)
    if FULL:
        code = integer - ROUND
        stored = code * code * code * per_element(value * UNIT, CUBIC)
        limit = tl.where(kept, rounded, INFINITY)
        return stored, (x != 0.0) & (stored == 0.0), magnitude > per_element(limit, CUBIC)
    else:
        return x, tl.zeros([TILE], tl.int1), tl.zeros([TILE], tl.int1)


@triton.jit
def load_log(codes, grid, start, left, TILE: tl.constexpr, MASKED: tl.constexpr, MATH: tl.constexpr):
    """Decode a tile: lowest * 2**((code - 1) * step), and 0 for code 0."""
    code = load_tile(codes, start, left, tl.uint8, TILE, MASKED).to(tl.float32)
    lowest, step = load_pairs(grid, start, left, LOG, TILE, MASKED)
    wide = per_element(step, LOG)
    value = per_element(lowest, LOG) * fast_exp2(tl.fma(code, wide, -wide), MATH)
    return tl.where(code == 0.0, 0.0, value)


@triton.jit
def store_log(
    v, codes, grid, start, left, key0, key1, TILE: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Encode a tile, rounding stochastically; returns what will be decoded. Nothing is ever lost or cut off."""
    largest = block_max(v, LOG, MATH)
    # Zero minus one is the largest unsigned number: the smallest non-zero element in two instructions.
    smallest = as_float(block_min(v.to(tl.uint32, bitcast=True) - 1, LOG) + 1)
    finite = largest < INFINITY
    kept = finite & (largest > 0.0)
    highest = tl.minimum(tl.maximum(tl.where(kept, largest, 1.0), SMALLEST), HIGHEST)
    lowest = tl.minimum(tl.maximum(tl.where(kept, smallest, 1.0), SMALLEST), LAST)
    lowest = tl.maximum(lowest, highest * NARROW)
    inverse = reciprocal(lowest, MATH)
    step = tl.maximum(fast_log2(highest * inverse, MATH) * (1 / 254), SMALLEST_STEP)

    # position = log2(v / lowest) / step, of [0, 254): as a fraction of 254, so that clamping it is free. A factor of
    # zero puts all elements of a block that is not finite, NaN and infinity too, on the lowest code.
    factor = tl.where(finite, fast_reciprocal(step, MATH) * (1 / 254), 0.0)
    fraction = fast_log2(v * per_element(inverse, LOG), MATH)
    fraction = unit_product(fraction, per_element(factor, LOG), MATH)
    below = floor_fma(fraction, BELOW_254, INTEGERS + 1, MATH)
    f = tl.fma(fraction, BELOW_254, INTEGERS + 1 - below)

    # Up with probability p = (2**(f*step) - 1) / (2**step - 1), here its Taylor polynomial in f*z, z = step*ln(2) of
    # [0, 0.35]: three instructions, exact at both ends, within 2e-5 for 40 octaves in a block and 7e-4 for 126.
    z = step * LN2
    a2 = z * 0.5
    a3 = z * z * (1 / 6)
    a1 = 65536 * fast_reciprocal(1 + a2 + a3, MATH)
    p = tl.fma(f, per_element(a1 * a3, LOG), per_element(a1 * a2, LOG))
    p = tl.fma(f, p, per_element(a1, LOG))
    p = tl.fma(f, p, INTEGERS)  # 2**23 + 65536 * p, rounded to an integer
    up = as_float(random16(start, key0, key1, TILE) | INTEGERS_BITS) < p
    code = as_bits(below)
    code = tl.where(up, code + 1, code)
    zero = tl.where(finite, 0.0, -1.0)  # the value that takes code 0, which a block of NaN must not have
    code = tl.where(v == per_element(zero, LOG), 0, code)

    store_tile(codes, start, left, code.to(tl.uint8), tl.uint8, TILE, MASKED)
    lowest = tl.where(kept, lowest, tl.where(finite, 0.0, NAN))
    step = tl.where(kept, step, tl.where(finite, 0.0, NAN))
    store_pairs(grid, start, left, lowest, step, LOG, TILE, MASKED)
    never = tl.zeros([TILE], tl.int1)
    if FULL:
        # The bits of a code are those of 2**23 + code; code 0 becomes -2**23, which the exponential takes to zero.
        wide = per_element(step, LOG)
        exponent = tl.fma(as_float(code) - INTEGERS, wide, -wide)
        return per_element(lowest, LOG) * fast_exp2(exponent, MATH), never, never
    else:
        return v, never, never


#: The functions ``(load, store)`` for each kind of slot.
FUNCTIONS = {Kind.SIGNED: (load_cubic, store_cubic), Kind.SECOND_MOMENT: (load_log, store_log)}
