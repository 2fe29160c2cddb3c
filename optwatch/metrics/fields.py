"""The row of statistics that a step leaves for each tensor: its fields, their order, and how rows merge.

A row holds ``TENSOR_FIELDS`` and then ``SLOT_FIELDS`` once for each slot of the update rule. Every field is a sum or
a maximum, so rows of work items, tensors and ranks merge without loss and ratios are formed last, by whoever shows
them. With ``x`` the exact value, ``y`` the value the next step will decode and ``u`` what the rule subtracts from the
weight (learning rate included, decay excluded):

=================== ======================================================================================
``grad_sq``         sum of g squared, of the gradient as it was given
``nonfinite``       number of gradient elements that are NaN or infinite
``update_sq``       sum of u squared
``update_error_sq`` sum of (u from the stored state - u from the exact state) squared
``weight_sq``       sum of the squared weights as stored after the step, with what a split format keeps beside them
``moment_grad``     sum of m*g, where m is the exact new value of the rule's first slot; 0 unless that is signed
``unchanged``       number of weights that the update cannot move: whose stored value, with what a split format keeps
                    beside it, did not change; where it is rounded stochastically, whose exact new value is the old
``error_sq``        sum of (x - y) squared; of (sqrt(x) - sqrt(y)) squared for second moments
``exact_sq``        sum of x squared; of x for second moments, that is of the squared square root
``sum``             sum of x
``absmax``          largest magnitude of x
``underflow``       number of elements that are not zero but stored as zero
``saturated``       number of finite elements larger than the largest magnitude their block can hold
=================== ======================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Where rows come from: the step's own kernel; sampled blocks, recomputed for one step; sampled blocks, recomputed
#: since the run began.
STEP, ESTIMATE, SHADOW = "step", "estimate", "shadow"
FAMILIES = (STEP, ESTIMATE, SHADOW)

#: Summed by every step, in both kernels.
CHEAP_FIELDS = ("grad_sq", "nonfinite", "update_sq")
#: Once per tensor; those after ``CHEAP_FIELDS`` only in a step with full statistics.
TENSOR_FIELDS = (*CHEAP_FIELDS, "update_error_sq", "weight_sq", "moment_grad", "unchanged")
#: Once per slot of a tensor, in a step with full statistics.
SLOT_FIELDS = ("error_sq", "exact_sq", "sum", "absmax", "underflow", "saturated")
#: Fields that merge by maximum; all others merge by addition.
MAXIMUM_FIELDS = frozenset({"absmax"})


def row_fields(slots: Sequence[str]) -> tuple[str, ...]:
    """The columns of a row for a rule with these slots, a slot's fields written ``slot.field``."""
    return TENSOR_FIELDS + tuple(f"{slot}.{field}" for slot in slots for field in SLOT_FIELDS)


def row_length(slots: int) -> int:
    """The number of columns of a row with this many slots."""
    return len(TENSOR_FIELDS) + slots * len(SLOT_FIELDS)


def maximum_columns(slots: int) -> NDArray[np.bool_]:
    """A mask over a row's columns, true where rows merge by maximum instead of addition."""
    names = TENSOR_FIELDS + SLOT_FIELDS * slots
    return np.array([name in MAXIMUM_FIELDS for name in names])


def merge_rows(rows: NDArray[np.float64], starts: NDArray[np.intp], slots: int) -> NDArray[np.float64]:
    """Merge consecutive rows: segment i holds the rows from ``starts[i]`` up to ``starts[i + 1]``.

    ``rows`` is ``[n, columns]`` and every segment must hold at least one row; the result is ``[len(starts), columns]``.
    """
    if not len(starts):
        return np.zeros((0, rows.shape[1]))
    merged = np.add.reduceat(rows, starts, axis=0)
    maxima = maximum_columns(slots)[: rows.shape[1]]
    if maxima.any():
        merged[:, maxima] = np.maximum.reduceat(rows[:, maxima], starts, axis=0)
    return merged
