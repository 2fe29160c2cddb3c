"""What an optimizer tells its subscribers after a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class StatsLayout:
    """Which tensors and slots the rows of a plan describe; a new object, unequal to the old, when that changes."""

    indices: tuple[int, ...]  # of the parameters, counted through all parameter groups
    numel: tuple[int, ...]
    slots: tuple[str, ...]
    second_moments: tuple[bool, ...]  # for each slot, whether its errors are taken on square roots
    codecs: tuple[str, ...]
    backend: str


@dataclass(frozen=True)
class PlanStats:
    """The rows of one plan: float64 ``[tensors, fields]`` as ``optwatch.metrics.fields`` lists them, on its device.

    The buffer is used again two steps later: copy what is needed, in stream order.
    """

    layout: StatsLayout
    rows: Tensor


@dataclass(frozen=True)
class StepStats:
    """The statistics of one optimizer step."""

    step: int  # calls of step() so far, from 1
    full: bool  # whether more than the cheap fields were summed
    layouts: tuple[StatsLayout, ...]  # of every plan that is bound
    plans: tuple[PlanStats, ...]  # of those that ran: the ones with a gradient
    #: ``DECISION`` as float64 on the device of a plan; None for an optimizer that decides nothing. The rows of a step
    #: that was skipped have only their gradients' fields.
    decision: Tensor | None = None
    #: Of a step that goes into a CUDA graph and was not taken: a list for what the graph writes, which then lives as
    #: long as the optimizer. Each replay fills ``rows`` and ``decision`` anew. None for a step that was taken.
    captured: list[object] | None = None


Subscriber = Callable[[StepStats], None]
