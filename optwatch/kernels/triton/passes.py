# mypy: disable-error-code="assignment"
# Tuples grow in unrolled loops here, which Triton's compiler follows and mypy does not.
"""The kernels that run before the step: they read what it will read, sum, and store nothing.

Their items and tables are the step's; their sums are folded as its are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.kernels.triton.functions import finite_or_zero, load_tile, row_of, scalars_at
from optwatch.kernels.triton.step import (
    FIXED,
    INFINITY,
    SLOT_COLUMNS,
    ZERO,
    add_products,
    count_nonfinite,
    unless_skipped,
)


@triton.jit
def sum_tile(
    total,
    grad,
    start,
    left,
    GRAD: tl.constexpr,
    TILE: tl.constexpr,
    LEVELS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """``total`` with the squares of one tile of gradients."""
    g = load_tile(grad, start, left, GRAD, TILE, MASKED).to(tl.float32)
    return add_products(total, g, g, LEVELS)


@triton.jit
def finite_squares(grad, first, length, TYPE: tl.constexpr, TILE: tl.constexpr):
    """The sum of squares of those of ``length`` gradient elements from ``first`` on that are finite."""
    total = tl.zeros([TILE], tl.float32)
    for at in range(0, length, TILE):
        g = finite_or_zero(load_tile(grad, first + at, length - at, TYPE, TILE, True).to(tl.float32))
        total = tl.fma(g, g, total)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["count", "columns"])
def gradients(
    table,  # int64 [tensors, columns]: addresses and lengths
    grads,  # int64 [tensors]: addresses of the gradients, 0 where there is none
    items,  # int32 [items, 2]: the tensor, and the number of the item in it
    partials,  # fp32 [3, items], written: see optwatch.kernels.plan.GRADIENT_SUMS
    count,  # number of items
    columns,  # of the table
    GRAD: tl.constexpr,  # element type
    ITEM: tl.constexpr,  # elements of an item
    TILE: tl.constexpr,  # elements of a tile
    LEVELS: tl.constexpr,  # 2**LEVELS neighbours are summed by one thread
):
    """The sums of every gradient."""
    item = tl.program_id(0)
    tensor = tl.load(items + item * 2).to(tl.int64)
    first = tl.load(items + item * 2 + 1).to(tl.int64) * ITEM
    grad = tl.load(grads + tensor)
    if grad != 0:
        length = tl.minimum(tl.load(table + tensor * columns) - first, ITEM).to(tl.int32)
        full = tl.where((grad & 15) == 0, length // TILE, 0)
        total = tl.zeros([TILE // 2**LEVELS], tl.float32)
        for tile in range(full):
            total = sum_tile(total, grad, first + tile * TILE, TILE, GRAD, TILE, LEVELS, False)
        for tile in range(full, tl.cdiv(length, TILE)):
            total = sum_tile(total, grad, first + tile * TILE, length - tile * TILE, GRAD, TILE, LEVELS, True)
        given = tl.sum(total, 0)
        nonfinite = 0.0
        finite = given
        if not (given < INFINITY):
            nonfinite = count_nonfinite(grad, first, length, GRAD, TILE)
            finite = finite_squares(grad, first, length, GRAD, TILE)
        stride = count.to(tl.int64)
        tl.store(partials + item, given)
        tl.store(partials + stride + item, nonfinite)
        tl.store(partials + 2 * stride + item, finite)


@triton.jit
def measure_tile(
    sums, row, grad, h, start, left, MEASURE, WEIGHT, SLOTS, GRAD: tl.constexpr,
    TILE: tl.constexpr, LEVELS: tl.constexpr, MASKED: tl.constexpr, GATE: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """``sums`` with the squares of what the rule measures on one tile."""
    g = load_tile(grad, start, left, GRAD, TILE, MASKED).to(tl.float32)
    if GATE == ZERO:
        g = finite_or_zero(g)
    w = WEIGHT[0](row[0], row[1], start, left, TILE, MASKED)
    old = ()
    for s in tl.static_range(len(SLOTS)):
        old = old + (SLOTS[s][0](row[2 + 2 * s], row[3 + 2 * s], start, left, TILE, MASKED, MATH),)
    measured = MEASURE(old, g, w, h, MATH)
    added = ()
    for m in tl.static_range(len(measured)):
        values = measured[m]
        if MASKED:  # where there is no element, a rule may find 0/0
            values = tl.where(tl.arange(0, TILE) < left, values, 0.0)
        added = added + (add_products(sums[m], values, values, LEVELS),)
    return added


@triton.jit(do_not_specialize=["count", "tensors"])
def measure(
    table,  # these are the step's arguments
    grads,
    scalars,
    items,
    partials,  # fp32 [NORMS, items], written
    decision,
    behind,
    known,
    count,
    tensors,
    RULE,
    WEIGHT,
    SLOTS,
    SCALARS: tl.constexpr,
    NORMS: tl.constexpr,
    GRAD: tl.constexpr,
    ITEM: tl.constexpr,
    TILE: tl.constexpr,
    LEVELS: tl.constexpr,
    GATE: tl.constexpr,
    MATH: tl.constexpr,
):
    """The sums of squares of what the rule takes norms of, of every tensor that has a gradient."""
    item = tl.program_id(0)
    tensor = tl.load(items + item * 2).to(tl.int64)
    first = tl.load(items + item * 2 + 1).to(tl.int64) * ITEM
    grad = tl.load(grads + tensor)
    if grad != 0:
        column = table + tensor * (FIXED + SLOT_COLUMNS * (1 + len(SLOTS)))
        row = ()
        addresses = grad
        for s in tl.static_range(2 * (1 + len(SLOTS))):
            row = row + (tl.load(column + FIXED + s),)
            addresses = addresses | row[s]
        h = scalars_at(scalars, row_of(tensor, tensors, behind, known, GATE), decision, SCALARS, GATE)
        sums = (tl.zeros([TILE // 2**LEVELS], tl.float32),) * NORMS

        length = unless_skipped(tl.minimum(tl.load(column) - first, ITEM).to(tl.int32), decision, GATE)
        full = tl.where((addresses & 15) == 0, length // TILE, 0)
        for tile in range(full):
            sums = measure_tile(
                sums, row, grad, h, first + tile * TILE, TILE, RULE[3], WEIGHT, SLOTS, GRAD,
                TILE, LEVELS, False, GATE, MATH,
            )  # fmt: skip
        for tile in range(full, tl.cdiv(length, TILE)):
            sums = measure_tile(
                sums, row, grad, h, first + tile * TILE, length - tile * TILE, RULE[3], WEIGHT, SLOTS, GRAD,
                TILE, LEVELS, True, GATE, MATH,
            )  # fmt: skip
        for m in tl.static_range(NORMS):
            tl.store(partials + m * count.to(tl.int64) + item, tl.sum(sums[m], 0))
