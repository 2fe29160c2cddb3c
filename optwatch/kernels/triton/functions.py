# mypy: disable-error-code="assignment"
# Tuples grow in unrolled loops here, which Triton's compiler follows and mypy does not.
"""Building blocks shared by the rules' and codecs' Triton functions: fast mathematics, random numbers, tiles.

Functions exist in several forms, chosen by the constant ``MATH``: ``PTX`` uses the approximate instructions of NVIDIA
chips, one each and in flush-to-zero form where only normal numbers matter; ``GENERIC`` is plain Triton, for other
chips; ``INTERPRETED`` makes up for what Triton's interpreter does differently. They agree to a few units in the last
place.

Products that meet a sum are written as ``tl.fma`` wherever they reach a weight or a code, and kernels are compiled
without automatic fusion: so the kernels with and without full statistics compute the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

GENERIC = tl.constexpr(0)
PTX = tl.constexpr(1)
INTERPRETED = tl.constexpr(2)


@triton.jit
def fast_log2(x, MATH: tl.constexpr):
    """log2(x); -inf at zero. Subnormal x may count as zero."""
    if MATH == PTX:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.log2(x)


@triton.jit
def fast_exp2(x, MATH: tl.constexpr):
    """2**x; subnormal results may be zero."""
    if MATH == PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.exp2(x)


@triton.jit
def fast_sqrt(x, MATH: tl.constexpr):
    """The square root of x; subnormal x may count as zero."""
    if MATH == PTX:
        return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.sqrt(x)


@triton.jit
def fast_rsqrt(x, MATH: tl.constexpr):
    """1 over the square root of x; inf at zero. Subnormal x may count as zero."""
    if MATH == PTX:
        return tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.rsqrt(x)


@triton.jit
def fast_reciprocal(x, MATH: tl.constexpr):
    """1/x; subnormal results may be zero."""
    if MATH == PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return 1.0 / x


@triton.jit
def reciprocal(x, MATH: tl.constexpr):
    """1/x for normal x, with subnormal results kept."""
    factor = tl.where(x > 1.0, 2.0**-64, 1.0)
    return fast_reciprocal(x * factor, MATH) * factor


@triton.jit
def unit_product(a, b, MATH: tl.constexpr):
    """a*b clamped to [0, 1]; 0 where the product is NaN."""
    if MATH == PTX:
        return tl.inline_asm_elementwise("mul.sat.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)
    else:
        product = a * b
        return tl.where(product == product, tl.minimum(tl.maximum(product, 0.0), 1.0), 0.0)


@triton.jit
def floor_fma(a, b, c, MATH: tl.constexpr):
    """a*b rounded down, plus c, for 0 <= a*b < 2**16 and c an integer of [2**23, 2**23 + 2**16)."""
    if MATH == PTX:
        return tl.inline_asm_elementwise(
            "fma.rm.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], tl.float32, True, 1
        )
    else:
        return tl.floor(a * b) + c


@triton.jit
def as_bits(x):
    """The bits of fp32 ``x`` as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def as_float(bits):
    """The fp32 number with these 32 bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def copy_sign(magnitude, sign):
    """``magnitude``, which is not negative, with the sign of ``sign``."""
    return as_float(as_bits(magnitude) | (as_bits(sign) & -2147483648))


@triton.jit
def larger(a, b):
    """The larger one; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    """The smaller one; NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def decayed(grad, weight, h):
    """The gradient with its sign and L2 decay, of a rule whose first scalars are grad_scale and l2."""
    return tl.fma(weight, h[1], grad * h[0])


@triton.jit
def subtract(weight, update, h, MATH: tl.constexpr):
    """The new weight of a rule whose decay is in the update."""
    return weight - update


@triton.jit
def row_max(x, axis: tl.constexpr, MATH: tl.constexpr):
    """The maximum of non-negative ``x`` along ``axis``, NaN if there is one."""
    if MATH == INTERPRETED:  # which loops over the elements in Python unless the reduction is a plain one
        return as_float(tl.max(as_bits(tl.abs(x)), axis))  # NaN has the largest bits
    else:
        return tl.reduce(x, axis, larger)


@triton.jit
def block_max(x, BLOCK: tl.constexpr, MATH: tl.constexpr):
    """The largest of every ``BLOCK`` non-negative elements, NaN if there is one: ``[TILE // BLOCK]``."""
    return row_max(tl.reshape(x, [x.shape[0] // BLOCK, BLOCK]), 1, MATH)


@triton.jit
def to_type(x, TYPE: tl.constexpr, MATH: tl.constexpr):
    """fp32 ``x`` as ``TYPE``, rounded to nearest even."""
    if MATH == INTERPRETED and TYPE == tl.bfloat16:  # noqa: SIM300 - which truncates, and loses subnormals
        bits = as_bits(x)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(TYPE)


@triton.jit
def block_min(x, BLOCK: tl.constexpr):
    """The smallest element of every ``BLOCK`` elements of a tile: ``[TILE // BLOCK]``."""
    return tl.min(tl.reshape(x, [x.shape[0] // BLOCK, BLOCK]), 1)


@triton.jit
def per_element(values, BLOCK: tl.constexpr):
    """One value a block, ``[TILE // BLOCK]``, repeated for the block's elements: ``[TILE]``."""
    wide = tl.broadcast_to(tl.expand_dims(values, 1), [values.shape[0], BLOCK])
    return tl.reshape(wide, [values.shape[0] * BLOCK])


@triton.jit
def pointers(address, start, TYPE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Pointers to ``TILE`` elements from ``start`` on of the array at ``address``.

    A full tile (not ``MASKED``) promises 16-byte alignment, so that the compiler may load 16 bytes at a time.
    """
    base = address.to(tl.pointer_type(TYPE))
    if not MASKED:
        base = tl.multiple_of(base, 16)
        start = tl.multiple_of(start, TILE)
    return base + start + tl.arange(0, TILE)


@triton.jit
def load_tile(address, start, left, TYPE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """``TILE`` elements from ``start`` on; where ``MASKED``, those from ``left`` on are not there and read as zero."""
    where = pointers(address, start, TYPE, TILE, MASKED)
    if MASKED:
        return tl.load(where, mask=tl.arange(0, TILE) < left, other=0)
    else:
        return tl.load(where)


@triton.jit
def store_tile(address, start, left, values, TYPE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Write ``TILE`` elements from ``start`` on; where ``MASKED``, only the first ``left``."""
    where = pointers(address, start, TYPE, TILE, MASKED)
    if MASKED:
        tl.store(where, values, mask=tl.arange(0, TILE) < left)
    else:
        tl.store(where, values)


@triton.jit
def finite_or_zero(x):
    """``x`` with zeros where it is NaN or infinite."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def scalars_at(scalars, row, decision, SCALARS: tl.constexpr, GATE: tl.constexpr):
    """The scalars of a row; with ``GATE`` the factor of clipping and that of unscaling are in the gradient's."""
    h = ()
    for k in tl.static_range(SCALARS):
        value = tl.load(scalars + row * SCALARS + k)
        if GATE != 0 and k == 0:
            value = value * (tl.load(decision + 1) * tl.load(decision + 2)).to(tl.float32)
        h = h + (value,)
    return h


@triton.jit
def row_of(tensor, tensors, behind, known, GATE: tl.constexpr):
    """The row of scalars and keys that holds for ``tensor``.

    With ``GATE`` there are rows for every number of steps that the device may have skipped and the host not yet heard
    of: so many times ``tensors`` further on.
    """
    if GATE != 0:
        tensor = tensor + tensors.to(tl.int64) * (tl.load(behind + tensor) - tl.load(known + tensor))
    return tensor


@triton.jit
def load_pairs(address, start, left, BLOCK: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Two fp32 numbers for each block of a tile; both at once where the alignment of a full tile is known."""
    index = tl.arange(0, TILE // BLOCK)
    if MASKED:
        where = address.to(tl.pointer_type(tl.float32)) + start // BLOCK * 2 + index * 2
        there = index < tl.cdiv(left, BLOCK)
        return tl.load(where, mask=there, other=0.0), tl.load(where + 1, mask=there, other=0.0)
    else:
        pair = tl.load(address.to(tl.pointer_type(tl.uint64)) + start // BLOCK + index)
        return as_float(pair.to(tl.uint32)), as_float((pair >> 32).to(tl.uint32))


@triton.jit
def store_pairs(
    address, start, left, first, second, BLOCK: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr
):
    """Write two fp32 numbers for each block of a tile."""
    index = tl.arange(0, TILE // BLOCK)
    if MASKED:
        where = address.to(tl.pointer_type(tl.float32)) + start // BLOCK * 2 + index * 2
        there = index < tl.cdiv(left, BLOCK)
        tl.store(where, first, mask=there)
        tl.store(where + 1, second, mask=there)
    else:
        upper = second.to(tl.uint32, bitcast=True).to(tl.uint64) << 32
        pair = upper | first.to(tl.uint32, bitcast=True).to(tl.uint64)
        tl.store(address.to(tl.pointer_type(tl.uint64)) + start // BLOCK + index, pair)


@triton.jit
def load_nibbles(address, start, left, TILE: tl.constexpr, MASKED: tl.constexpr):
    """``TILE`` numbers of four bits as int32, two a byte with the even element in the lower half."""
    pair = load_tile(address, start // 2, (left + 1) // 2, tl.uint8, TILE // 2, MASKED).to(tl.int32)
    return tl.reshape(tl.join(pair & 15, pair >> 4), [TILE])


@triton.jit
def store_nibbles(address, start, left, values, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Write ``TILE`` int32 numbers of [0, 16); where ``MASKED``, a missing half of the last byte is zero."""
    if MASKED:
        values = tl.where(tl.arange(0, TILE) < left, values, 0)
    even, odd = tl.split(tl.reshape(values, [TILE // 2, 2]))
    pair = (even | (odd << 4)).to(tl.uint8)
    store_tile(address, start // 2, (left + 1) // 2, pair, tl.uint8, TILE // 2, MASKED)


@triton.jit
def random16(start, key0, key1, TILE: tl.constexpr):
    """The 16-bit numbers of ``TILE`` elements from ``start`` on, as int32; see :mod:`optwatch.kernels.random`.

    One hash serves two neighbours. ``start`` is a multiple of ``TILE``, so the upper half of the pair's index is the
    same in the whole tile.
    """
    pair = start // 2
    first = pair.to(tl.uint32) + key0 + (pair >> 32).to(tl.uint32) * 0x9E3779B9
    word = first + tl.arange(0, TILE // 2).to(tl.uint32)
    word ^= word >> 16
    word *= 0x7FEB352D
    word ^= (word >> 15) ^ (key1 ^ (key1 >> 15))  # as xor with the key first would give, an instruction less
    word *= 0x846CA68B
    word ^= word >> 16
    return tl.reshape(tl.join(word & 0xFFFF, word >> 16), [TILE]).to(tl.int32)
