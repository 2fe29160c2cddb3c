"""What a kernel is asked to do: a plan, the tensors bound to it, and the protocol of those who run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optwatch.codecs import CORRECTION, VALUES, Codec, weight_codec
from optwatch.metrics.fields import row_length
from optwatch.rules import Rule

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

    def run(self, grads: Sequence[Tensor | None], scalars: Scalars, keys: Keys, full: bool) -> Tensor:
        """Take one step on every tensor that has a gradient and return the rows of statistics.

        ``grads`` are contiguous, of the spec's type, one for each bound tensor; a tensor without gradient is left
        alone and its row is zero. ``scalars`` is ``[n, len(rule.scalars)]`` and ``keys`` ``[n, slots + 1, 2]``, the
        last one the weight's. The rows are float64 ``[n, spec.columns]`` on the plan's device; without ``full`` only
        ``CHEAP_FIELDS`` are summed and the rest is zero. The buffer is used again two runs later. Nothing waits for the
        device.
        """


class Backend(Protocol):
    """Something that can run plans."""

    name: str

    def why_not(self, spec: PlanSpec, device: torch.device) -> str | None:
        """The reason why this backend cannot run ``spec`` on ``device``, or None if it can."""

    def bind(self, spec: PlanSpec, tensors: Sequence[PlanTensor]) -> BoundPlan:
        """Prepare to run ``spec`` on these tensors, all on one device."""
