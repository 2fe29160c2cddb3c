# mypy: disable-error-code="assignment"
# Tuples grow in unrolled loops here, which Triton's compiler follows and mypy does not.
"""The kernels: one step over all tensors of a plan, and the fold of its partial sums.

The step kernel knows neither rules nor codecs: it is compiled with their functions as constants. One program works on
one item, a run of ``ITEM`` elements of one tensor, tile by tile. Its sums go to the item's own place, so nothing is
atomic and results do not depend on the order of programs.

A row of the table holds, as int64: the parameter's length, and two addresses each for the weight (its own and its
correction's) and for each slot.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optwatch.kernels.triton.functions import (
    fast_sqrt,
    finite_or_zero,
    larger,
    load_tile,
    row_max,
    row_of,
    scalars_at,
)

CHEAP = tl.constexpr(3)  # fields summed by every step
TENSOR = tl.constexpr(7)  # fields of a tensor
PER_SLOT = tl.constexpr(6)  # fields of a slot
ABSMAX = tl.constexpr(3)  # the field of a slot that merges by maximum
FIXED = tl.constexpr(1)  # columns of the table before those of the weight
SLOT_COLUMNS = tl.constexpr(2)  # columns of the weight, and of a slot
INFINITY = tl.constexpr(float("inf"))
GATED = tl.constexpr(1)  # the step follows a decision,
ZERO = tl.constexpr(2)  # and gradients that are not finite count as zero
SKIPPED = tl.constexpr(3)  # the place of the decision that says whether the step is skipped


@triton.jit
def split_lanes(x, LEVELS: tl.constexpr):
    """A tile as ``2**LEVELS`` tensors: the i-th elements of all those neighbours that one thread holds."""
    parts = (x,)
    for level in tl.static_range(LEVELS):
        finer = ()
        for i in tl.static_range(2**level):
            even, odd = tl.split(tl.reshape(parts[i], [parts[i].shape[0] // 2, 2]))
            finer = finer + (even, odd)
        parts = finer
    return parts


@triton.jit
def add_products(total, a, b, LEVELS: tl.constexpr):
    """``total[i]`` plus the sum of a*b over the i-th ``2**LEVELS`` neighbours, one instruction for each."""
    lefts = split_lanes(a, LEVELS)
    rights = split_lanes(b, LEVELS)
    for i in tl.static_range(2**LEVELS):
        total = tl.fma(lefts[i], rights[i], total)
    return total


@triton.jit
def add_count(total, condition, LEVELS: tl.constexpr):
    """``total[i]`` plus the number of true ones among the i-th ``2**LEVELS`` neighbours; fp32 counts up to 2**24."""
    parts = split_lanes(condition, LEVELS)
    for i in tl.static_range(2**LEVELS):
        total = tl.where(parts[i], total + 1.0, total)
    return total


@triton.jit
def add_values(total, values, LEVELS: tl.constexpr):
    """``total[i]`` plus the sum over the i-th ``2**LEVELS`` neighbours."""
    return total + tl.sum(tl.reshape(values, [values.shape[0] // 2**LEVELS, 2**LEVELS]), 1)


@triton.jit
def add_maximum(total, values, LEVELS: tl.constexpr, MATH: tl.constexpr):
    """``total[i]`` or the largest of the i-th ``2**LEVELS`` neighbours; NaN if there is one."""
    values = tl.reshape(values, [values.shape[0] // 2**LEVELS, 2**LEVELS])
    return larger(total, row_max(values, 1, MATH))


@triton.jit
def step_tile(
    sums, row, grad, keys, h, start, left, RULE, WEIGHT, SLOTS, STOCHASTIC: tl.constexpr, GRAD: tl.constexpr,
    SECOND: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr,
    GATE: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """One step on one tile; returns ``sums`` with what happened there added."""
    g = load_tile(grad, start, left, GRAD, TILE, MASKED).to(tl.float32)
    if GATE == ZERO:
        g = finite_or_zero(g)
    w = WEIGHT[0](row[0], row[1], start, left, TILE, MASKED)
    old = ()
    for s in tl.static_range(len(SLOTS)):
        old = old + (SLOTS[s][0](row[2 + 2 * s], row[3 + 2 * s], start, left, TILE, MASKED, MATH),)

    exact, u = RULE[0](old, g, w, h, MATH)
    if MASKED:  # where there is no element, a rule may find 0/0
        there = tl.arange(0, TILE) < left
        u = tl.where(there, u, 0.0)
        kept = ()
        for s in tl.static_range(len(SLOTS)):
            kept = kept + (tl.where(there, exact[s], 0.0),)
        exact = kept
    moved = RULE[2](w, u, h, MATH)
    new = WEIGHT[1](
        moved, row[0], row[1], start, left, keys[2 * len(SLOTS)], keys[2 * len(SLOTS) + 1], TILE, MASKED, MATH
    )

    added = (add_products(sums[0], g, g, LEVELS), add_products(sums[1], u, u, LEVELS))
    stored = ()
    marks = ()
    for s in tl.static_range(len(SLOTS)):
        y, lost, cut = SLOTS[s][1](
            exact[s], row[2 + 2 * s], row[3 + 2 * s], start, left, keys[2 * s], keys[2 * s + 1],
            TILE, MASKED, FULL, MATH,
        )  # fmt: skip
        stored = stored + (y,)
        marks = marks + (lost, cut)
    if FULL:
        error = RULE[1](stored, g, h, MATH) - RULE[1](exact, g, h, MATH)
        # A weight that might have moved, had the numbers been others, is none that its update cannot move.
        same = moved == w if STOCHASTIC else new == w
        if MASKED:
            error = tl.where(there, error, 0.0)
            same = same & there
        moment = sums[4]
        if len(SLOTS) > 0 and SECOND & 1 == 0:  # the first slot is a first moment
            moment = add_products(moment, exact[0], g, LEVELS)
        added = added + (
            add_products(sums[2], error, error, LEVELS),
            add_products(sums[3], new, new, LEVELS),
            moment,
            add_count(sums[5], same, LEVELS),
        )
        for s in tl.static_range(len(SLOTS)):
            added = added + slot_sums(
                sums, TENSOR - 1 + PER_SLOT * s, exact[s], stored[s], marks[2 * s], marks[2 * s + 1],
                SECOND >> s & 1, LEVELS, MATH,
            )  # fmt: skip
    return added


@triton.jit
def slot_sums(
    sums, at: tl.constexpr, x, y, lost, cut, SECOND: tl.constexpr, LEVELS: tl.constexpr, MATH: tl.constexpr
):  # fmt: skip
    """The fields of a slot with exact values ``x`` that are kept as ``y``, from field ``at`` of ``sums`` on."""
    total = add_values(sums[at + 2], x, LEVELS)
    if SECOND:
        error = fast_sqrt(x, MATH) - fast_sqrt(y, MATH)
        exact_sq = total
    else:
        error = x - y
        exact_sq = add_products(sums[at + 1], x, x, LEVELS)
    return (
        add_products(sums[at], error, error, LEVELS),
        exact_sq,
        total,
        add_maximum(sums[at + 3], tl.abs(x), LEVELS, MATH),
        add_count(sums[at + 4], lost, LEVELS),
        add_count(sums[at + 5], cut, LEVELS),
    )


@triton.jit
def count_nonfinite(grad, first, length, TYPE: tl.constexpr, TILE: tl.constexpr):
    """How many of ``length`` gradient elements from ``first`` on are NaN or infinite, as fp32."""
    count = tl.zeros([TILE], tl.float32)
    for at in range(0, length, TILE):
        g = load_tile(grad, first + at, length - at, TYPE, TILE, True).to(tl.float32)
        count = tl.where(tl.abs(g) < INFINITY, count, count + 1.0)
    return tl.sum(count, 0)


@triton.jit
def unless_skipped(length, decision, GATE: tl.constexpr):
    """``length``, or 0 if the step is skipped."""
    if GATE != 0:
        length = tl.where(tl.load(decision + SKIPPED) != 0, 0, length)
    return length


@triton.jit
def norms_of(norms, tensor, NORMS: tl.constexpr):
    """The norms that the rule's first pass found for a tensor."""
    found = ()
    for k in tl.static_range(NORMS):
        found = found + (tl.sqrt(tl.load(norms + tensor * NORMS + k)).to(tl.float32),)
    return found


@triton.jit(do_not_specialize=["count", "tensors"])
def step(
    table,  # int64 [tensors, FIXED + SLOT_COLUMNS * (1 + slots)]: lengths and addresses
    grads,  # int64 [tensors]: addresses of the gradients, 0 where there is none
    scalars,  # fp32 [tensors, SCALARS]
    keys,  # uint32 [tensors, slots + 1, 2], the last one the weight's
    items,  # int32 [items, 2]: the tensor, and the number of the item in it
    partials,  # fp32 [fields, items], written
    norms,  # fp64 [tensors, NORMS]: sums of squares from the rule's first pass
    decision,  # fp64, see optwatch.kernels.plan.DECISION
    behind,  # int32 [tensors]: how many counted steps the device skipped
    known,  # int32 [tensors]: how many of them the host has uncounted
    count,  # number of items
    tensors,  # number of tensors
    RULE,  # (step, update, apply), and with norms (.., measure, conclude)
    WEIGHT,  # (load, store) of the weight
    SLOTS,  # (load, store) of each slot
    SCALARS: tl.constexpr,  # scalars of the rule
    NORMS: tl.constexpr,  # norms that it takes
    STOCHASTIC: tl.constexpr,  # whether the weight is rounded stochastically
    GRAD: tl.constexpr,  # element type
    SECOND: tl.constexpr,  # bit s is set where slot s is a second moment
    ITEM: tl.constexpr,  # elements of an item
    TILE: tl.constexpr,  # elements of a tile, a multiple of every block
    LEVELS: tl.constexpr,  # 2**LEVELS neighbours are summed by one thread
    FULL: tl.constexpr,  # whether to sum all statistics
    GATE: tl.constexpr,  # 0, GATED or ZERO; then scalars and keys hold several rows for a tensor, see row_of
    MATH: tl.constexpr,
):
    """One step on every element of every tensor that has a gradient."""
    item = tl.program_id(0)
    tensor = tl.load(items + item * 2).to(tl.int64)
    first = tl.load(items + item * 2 + 1).to(tl.int64) * ITEM
    grad = tl.load(grads + tensor)
    if grad != 0:
        column = table + tensor * (FIXED + SLOT_COLUMNS * (1 + len(SLOTS)))
        chosen = row_of(tensor, tensors, behind, known, GATE)
        length = tl.load(column)
        row = ()
        seeds = ()
        addresses = grad
        for s in tl.static_range(2 * (1 + len(SLOTS))):
            row = row + (tl.load(column + FIXED + s),)
            addresses = addresses | row[s]
            seeds = seeds + (tl.load(keys + chosen * (2 * (1 + len(SLOTS))) + s),)
        h = scalars_at(scalars, chosen, decision, SCALARS, GATE)
        if NORMS > 0:
            h = RULE[4](h, norms_of(norms, tensor, NORMS), MATH)
        sums = no_sums(len(SLOTS), TILE // 2**LEVELS, FULL)

        length = unless_skipped(tl.minimum(length - first, ITEM).to(tl.int32), decision, GATE)
        # An array that does not start at a multiple of 16 bytes takes the branch without wide loads throughout.
        full = tl.where((addresses & 15) == 0, length // TILE, 0)
        for tile in range(full):
            sums = step_tile(
                sums, row, grad, seeds, h, first + tile * TILE, TILE, RULE, WEIGHT, SLOTS, STOCHASTIC, GRAD,
                SECOND, TILE, LEVELS, False, FULL, GATE, MATH,
            )  # fmt: skip
        for tile in range(full, tl.cdiv(length, TILE)):
            sums = step_tile(
                sums, row, grad, seeds, h, first + tile * TILE, length - tile * TILE, RULE, WEIGHT, SLOTS,
                STOCHASTIC, GRAD, SECOND, TILE, LEVELS, True, FULL, GATE, MATH,
            )  # fmt: skip

        out = partials + item
        stride = count.to(tl.int64)
        grad_sq = tl.sum(sums[0], 0)
        # Counting costs more than the sum, and only where the sum is not finite is there anything to count.
        nonfinite = 0.0
        if not (grad_sq < INFINITY):
            nonfinite = count_nonfinite(grad, first, length, GRAD, TILE)
        tl.store(out, grad_sq)
        tl.store(out + stride, nonfinite)
        for i in tl.static_range(1, len(sums)):
            if i >= TENSOR and (i - (TENSOR - 1)) % PER_SLOT == ABSMAX:
                total = row_max(sums[i], 0, MATH)
            else:
                total = tl.sum(sums[i], 0)
            tl.store(out + (i + 1) * stride, total)


@triton.jit
def no_sums(slots: tl.constexpr, LENGTH: tl.constexpr, FULL: tl.constexpr):
    """Sums of nothing, for all fields but the number of non-finite gradients."""
    sums = (tl.zeros([LENGTH], tl.float32),) * (CHEAP - 1)
    if FULL:
        sums = (sums[0],) * (TENSOR - 1 + PER_SLOT * slots)
    return sums


@triton.jit(do_not_specialize=["count", "columns"])
def fold(
    partials,  # fp32 [fields, count]
    grads,  # int64 [tensors]
    starts,  # int32 [tensors + 1]: the first item of each tensor
    rows,  # fp64 [tensors, columns], written
    count,  # number of items
    columns,  # of a row
    CHUNK: tl.constexpr,  # partial sums read at once
    MATH: tl.constexpr,
):
    """Fold the partial sums of field ``program_id(1)`` of tensor ``program_id(0)`` to one number of its row."""
    tensor = tl.program_id(0)
    field = tl.program_id(1)
    first = tl.load(starts + tensor)
    last = tl.load(starts + tensor + 1)
    if tl.load(grads + tensor) == 0:
        last = first
    column = partials + field * count.to(tl.int64)
    total = tl.zeros([CHUNK], tl.float64)
    largest = tl.zeros([CHUNK], tl.float32)
    for start in range(first, last, CHUNK):
        item = start + tl.arange(0, CHUNK)
        value = tl.load(column + item, mask=item < last, other=0.0)
        total += value.to(tl.float64)
        largest = larger(largest, value)
    value = tl.sum(total, 0)
    if (field > TENSOR) & ((field - TENSOR) % PER_SLOT == ABSMAX):
        value = row_max(largest, 0, MATH).to(tl.float64)
    tl.store(rows + tensor.to(tl.int64) * columns + field, value)
