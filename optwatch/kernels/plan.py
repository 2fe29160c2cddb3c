"""What a kernel is asked to do: a plan, the tensors bound to it, and the protocol of those who run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optwatch.codecs import CORRECTION, VALUES, Codec, weight_codec
from optwatch.metrics.fields import row_length
from optwatch.rules import Rule

#: What a first pass sums of the gradients of a tensor: their squares as they were given, how many are NaN or infinite,
#: and the squares of the others.
GRADIENT_SUMS = ("given_sq", "nonfinite", "finite_sq")
#: What a step that clips, skips or unscales was decided to be: the norm of all gradients before clipping, the factor of
#: clipping, the factor that undid a loss scale, whether the step was skipped (1 or 0), and how many gradient elements
#: were NaN or infinite.
DECISION = ("norm", "clip", "unscale", "skipped", "nonfinite")

#: From the sums of squares of the pieces of tensors that are bound here, ``[n, norms]``, those of the whole tensors.
Combine = Callable[[Tensor], Tensor]
Scalars = NDArray[np.float32]
Keys = NDArray[np.uint32]


@dataclass(frozen=True)
class PlanSpec:
    """What a kernel is specialised on: a rule, a codec for each of its slots, element types and the weight format."""

    rule: Rule
    codecs: tuple[Codec, ...]
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    weights: str = "native"

    @property
    def weight(self) -> Codec:
        """How the weight is kept."""
        return weight_codec(self.weights, self.param_dtype)

    @property
    def columns(self) -> int:
        """The length of a row of statistics."""
        return row_length(len(self.codecs))

    @property
    def stochastic(self) -> bool:
        """Whether any slot or the weight needs random numbers."""
        return any(codec.stochastic for codec in (*self.codecs, self.weight))

    def __str__(self) -> str:
        """Such as ``adamw[int8_cubic, int8_log] on bfloat16 with float32 gradients``."""
        names = ", ".join(codec.name for codec in self.codecs)
        param, grad = (str(d).removeprefix("torch.") for d in (self.param_dtype, self.grad_dtype))
        kept = "" if self.weights == "native" else f" kept as {self.weight.name}"
        return f"{self.rule.name}[{names}] on {param}{kept} with {grad} gradients"


@dataclass(frozen=True)
class PlanTensor:
    """A parameter with its state: ``param`` is flat and contiguous, each slot's buffers are as its codec lists them.

    ``correction`` is what a split weight format keeps beside the parameter, and as flat.
    """

    param: Tensor
    slots: tuple[Mapping[str, Tensor], ...]
    correction: Tensor | None = None

    @property
    def weight(self) -> dict[str, Tensor]:
        """The buffers of the weight's codec."""
        return {VALUES: self.param} | ({} if self.correction is None else {CORRECTION: self.correction})


class BoundPlan(Protocol):
    """A plan bound to tensors on one device."""

    def sum_gradients(self, grads: Sequence[Tensor | None]) -> Tensor:
        """``GRADIENT_SUMS`` of each tensor, float64 ``[n, 3]`` on the plan's device; zero without a gradient.

        It reads the gradients and nothing else. The buffer is used again two runs later.
        """

    def run(
        self, grads: Sequence[Tensor | None], scalars: Scalars, keys: Keys, full: bool, zero: bool = False
    ) -> Tensor:
        """Take one step on every tensor that has a gradient and return the rows of statistics.

        ``grads`` are contiguous, of the spec's type, one for each bound tensor; a tensor without gradient is left
        alone and its row is zero. ``scalars`` is ``[n, len(rule.scalars)]`` and ``keys`` ``[n, slots + 1, 2]``, the
        last one the weight's. The rows are float64 ``[n, spec.columns]`` on the plan's device; without ``full`` only
        ``CHEAP_FIELDS`` are summed and the rest is zero. The buffer is used again two runs later; ``scalars`` and
        ``keys`` are the caller's again at once. Nothing waits for the device. With ``zero``, gradient elements that are
        NaN or infinite count as zero, in the statistics too.
        """


@runtime_checkable
class DeferringPlan(BoundPlan, Protocol):
    """A bound plan whose device decides how a step is taken, without the host hearing of it in time."""

    def run_decided(
        self, grads: Sequence[Tensor | None], scalars: Scalars, keys: Keys, full: bool, zero: bool, decision: Tensor,
        counts: bool,
    ) -> Tensor:  # fmt: skip
        """:meth:`run`, as ``decision`` says (``DECISION``, on the plan's device).

        The gradient is multiplied by its factors; a step that it skips leaves everything as it was, and its rows are
        zero. Whether the steps before this one were skipped decides how often each tensor has been stepped, so
        ``scalars`` is ``[alternatives, n, ..]`` and ``keys`` as well: the first for as many steps as the host has
        counted, then for one less each. A step that is skipped makes the device take a later one from the next step on
        if it ``counts``.
        """

    def uncount(self, stepped: NDArray[np.bool_]) -> None:
        """The host has heard that a step was skipped and has uncounted it, of the tensors that had a gradient in it."""


@runtime_checkable
class CapturablePlan(DeferringPlan, Protocol):
    """A bound plan that takes everything from its device, so that a CUDA graph can hold its steps."""

    def sum_there(self, addresses: Tensor) -> Tensor:
        """:meth:`sum_gradients`, of gradients at these ``addresses``: int64 ``[n]``, 0 where there is none."""

    def run_there(
        self,
        addresses: Tensor,
        scalars: Tensor,
        keys: Tensor,
        full: bool,
        zero: bool,
        decision: Tensor | None,
    ) -> Tensor:
        """:meth:`run`, or with a ``decision`` :meth:`run_decided`, from what lies on the device.

        ``scalars`` and ``keys`` are those of :meth:`run`, and contiguous. Who calls it counts.
        """


class Backend(Protocol):
    """Something that can run plans."""

    name: str

    def why_not(self, spec: PlanSpec, device: torch.device) -> str | None:
        """The reason why this backend cannot run ``spec`` on ``device``, or None if it can."""

    def bind(
        self, spec: PlanSpec, tensors: Sequence[PlanTensor], combine: Combine | None = None
    ) -> BoundPlan:
        """Prepare to run ``spec`` on these tensors, all on one device.

        Where they are pieces of larger ones, of which the rule takes norms, ``combine`` asks the other pieces' ranks.
        """
