"""What an optimizer decides from all its gradients together, before any weight moves: clipping, unscaling, skipping.

A first pass of each plan sums the squares of its gradients and counts those that are not finite. From the sums of all
plans, whatever their groups, types and devices, follows one decision. The step then multiplies the gradient by one
factor where it reads it; gradients are not written, and a gradient is its own value before clipping in all statistics.

Under a process group every rank comes to the same decision: replicas (DDP) have the same gradients, and of parameters
that are cut into shards (DTensor) the ranks first add up what each has summed of its own pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MODES = ("skip", "raise", "zero")
#: Added to the norm, as torch.nn.utils.clip_grad_norm_ does.
CLIP_EPS = 1e-6


@dataclass(frozen=True)
class Gate:
    """What is asked for: the settings of an optimizer, and what a loss scaler left for this step."""

    max_norm: float | None
    mode: str | None  # one of MODES
    scale: Tensor | float | None  # by which the loss was multiplied
    found_inf: Tensor | float | None  # whether the scaler found a gradient that is not finite

    @property
    def may_skip(self) -> bool:
        """Whether a step may turn out to be skipped."""
        return self.mode in ("skip", "raise") or self.found_inf is not None

    @property
    def closed(self) -> bool:
        """Whether steps go through it: nothing is asked for otherwise."""
        asked = self.max_norm is not None or self.mode is not None
        return asked or self.scale is not None or self.found_inf is not None

    def decide(self, sums: Sequence[Tensor]) -> Tensor:
        """``DECISION`` of :mod:`optwatch.kernels.plan` from the ``GRADIENT_SUMS`` of every plan; nothing waits.

        The norm is the root of the sum of squares over all plans, divided by the loss scale. As for
        ``clip_grad_norm_(error_if_nonfinite=False)``, the factor is max_norm / (norm + 1e-6), at most 1, and NaN for a
        norm that is NaN.
        """
        device = sums[0].device
        given_sq, nonfinite, finite_sq = torch.stack(
            [rows.sum(0).to(device, non_blocking=True) for rows in sums]
        ).sum(0)
        one = torch.ones((), dtype=torch.float64, device=device)
        unscale = one if self.scale is None else one / _on(self.scale, device)
        norm = (finite_sq if self.mode == "zero" else given_sq).sqrt() * unscale
        clip = one if self.max_norm is None else (self.max_norm / (norm + CLIP_EPS)).clamp(max=1.0)
        skip = torch.zeros_like(one)
        if self.mode in ("skip", "raise"):
            skip = torch.maximum(skip, (nonfinite > 0).double())
        if self.found_inf is not None:
            skip = torch.maximum(skip, (_on(self.found_inf, device) > 0).double())
        return torch.stack([norm, clip, unscale, skip, nonfinite])  # DECISION

    def verdicts(self, decision: Tensor, sums: Sequence[Tensor]) -> list[Verdict]:
        """The decision on the host, for each plan, which waits where it lies on a GPU."""
        _, clip, unscale, skip, _ = decision.tolist()
        return [Verdict(clip, unscale, bool(skip), self.mode == "zero", rows) for rows in sums]


@dataclass(frozen=True)
class Verdict:
    """A decision on the host."""

    clip: float
    unscale: float
    skip: bool
    zero: bool  # gradient elements that are not finite count as zero
    sums: Tensor  # GRADIENT_SUMS of the plan that the verdict is handed to

    @property
    def factor(self) -> float:
        """By which the step multiplies the gradient."""
        return self.clip * self.unscale


@dataclass(frozen=True)
class Deferred:
    """A decision that stays on the device."""

    decision: Tensor
    zero: bool
    sums: Tensor  # GRADIENT_SUMS of the plan that the verdict is handed to
    under_way: int  # steps before this one whose decision the host has not heard of

    @property
    def unscale(self) -> Tensor:
        """The factor that undoes a loss scale."""
        return self.decision[2]


def check_gate(max_grad_norm: float | None, nonfinite: str | None) -> None:
    """Raise a ``ValueError`` for settings that mean nothing."""
    if max_grad_norm is not None and not (max_grad_norm > 0 and math.isfinite(max_grad_norm)):
        raise ValueError(f"max_grad_norm={max_grad_norm!r}: expected a number greater than 0, or None")
    if nonfinite is not None and nonfinite not in MODES:
        raise ValueError(f"nonfinite={nonfinite!r}: use one of {', '.join(map(repr, MODES))}, or None")


def check_release(max_grad_norm: float | None, nonfinite: str | None, found_inf: object) -> None:
    """Raise a ``RuntimeError`` where gradients that are stepped one by one should wait for each other."""
    asked = {"max_grad_norm": max_grad_norm, "nonfinite": nonfinite, "a loss scaler": found_inf}
    for name, value in asked.items():
        if value is not None:
            raise RuntimeError(
                f"release_gradients() and {name} exclude each other: one steps each parameter as its gradient "
                "arrives, the other decides from all gradients; do without one of them"
            )


def _on(value: Tensor | float, device: torch.device) -> Tensor:
    """A number of the scaler's as a float64 scalar on ``device``."""
    return torch.as_tensor(value).to(device, torch.float64, non_blocking=True).reshape(())
