"""AMSGrad (Reddi, Kale and Kumar, 2018, algorithm 2) as torch.optim has it: the largest v, not bias-corrected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optwatch.codecs.base import Kind
from optwatch.rules.base import Numbers, Rule, Slot


class AMSGrad(Rule):
    """A rule of the Adam family with max_v = max(max_v, v) in the place of v in its update."""

    def __init__(self, adam: Rule) -> None:
        self.adam = adam
        self.name = f"{adam.name}_amsgrad"
        self.slots = (*adam.slots, Slot("max_exp_avg_sq", Kind.SECOND_MOMENT))
        self.scalars = adam.scalars

    def prepare(self, options: Mapping[str, Numbers], step: Numbers) -> Numbers:
        """Nothing changes."""
        return self.adam.prepare(options, step)

    def step(
        self, state: Sequence[Tensor], grad: Tensor, weight: Tensor, h: Mapping[str, float]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Adam's moments, the largest second one, and the update from that."""
        exp_avg, exp_avg_sq, largest = state
        (exp_avg, exp_avg_sq), _ = self.adam.step((exp_avg, exp_avg_sq), grad, weight, h)
        new = exp_avg, exp_avg_sq, torch.maximum(largest, exp_avg_sq)
        return new, self.update(new, grad, h)

    def update(self, state: Sequence[Tensor], grad: Tensor, h: Mapping[str, float]) -> Tensor:
        """Adam's, from the largest v: an error of v itself shows when it becomes the largest."""
        exp_avg, _, largest = state
        return self.adam.update((exp_avg, largest), grad, h)

    def apply(self, weight: Tensor, update: Tensor, h: Mapping[str, float]) -> Tensor:
        """Adam's, with its kind of decay."""
        return self.adam.apply(weight, update, h)
