"""LAMB: layer-wise adaptive moments (You et al., 2020, algorithm 2, with phi(x) = x), as optax.lamb has it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optwatch.rules.adamw.rule import AdamW
from optwatch.rules.base import Numbers, library, parts


class LAMB(AdamW):
    """r = m/bc1 / (sqrt(v)/sqrt(bc2) + eps) + decay*w, ratio = |w| / |r| over the tensor, w = w - lr * ratio * r.

    The ratio is 1 where either norm is 0. Once it is known the step is AdamW's, with lr times the ratio as its rate.
    """

    name = "lamb"
    norms = ("weight", "direction")
    scalars = (
        *AdamW.scalars[:5],
        "step_size",  # lr / (1 - beta1**step), times the ratio
        "inv_sqrt_bc2",  # 1 / sqrt(1 - beta2**step)
        "decay",  # 1 - lr * weight_decay, times the ratio
        "inv_bc1",  # 1 / (1 - beta1**step)
        "weight_decay",
        "lr",
        "adapts",  # whether there is a ratio: 1 or 0
        "max_ratio",  # which it does not exceed
    )

    def prepare(self, options: Mapping[str, Numbers], step: Numbers) -> Numbers:
        """The step size and the decay are those of the ratio 1."""
        beta1, beta2 = parts(options["betas"])
        maths, corrects = library(step), options["bias_correction"] != 0
        inv_bc1 = maths.where(corrects, 1 / (1 - beta1**step), 1.0)
        return self.columns(
            step,
            grad_scale=1 - 2 * options["maximize"],
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            eps=options["eps"],
            step_size=options["lr"] * inv_bc1,
            inv_sqrt_bc2=maths.where(corrects, 1 / maths.sqrt(1 - beta2**step), 1.0),
            decay=1 - options["lr"] * options["weight_decay"],
            inv_bc1=inv_bc1,
            weight_decay=options["weight_decay"],
            lr=options["lr"],
            adapts=(options["always_adapt"] != 0) | (options["weight_decay"] != 0),
            max_ratio=maths.where(options["trust_clip"] != 0, 1.0, math.inf),
        )

    def measure(
        self, state: Sequence[Tensor], grad: Tensor, weight: Tensor, h: Mapping[str, float]
    ) -> tuple[Tensor, ...]:
        """The weight, and r."""
        _, direction = self.step(state, grad, weight, {**h, "step_size": h["inv_bc1"]})
        return weight, direction + weight * h["weight_decay"]

    def conclude(self, h: Mapping[str, Tensor], sums: Sequence[Tensor]) -> dict[str, Tensor]:
        """Step size and decay with the ratio."""
        weight, direction = (total.sqrt() for total in sums)
        one = torch.ones_like(weight)
        ratio = torch.where((weight > 0) & (direction > 0), weight / direction, one)
        ratio = torch.where(h["adapts"] > 0, torch.minimum(ratio, h["max_ratio"]), one)
        # A norm that is NaN is not to become 1 and go unseen.
        ratio = torch.where((weight + direction).isnan(), weight + direction, ratio)
        return {
            "step_size": h["step_size"] * ratio,
            "decay": 1 - h["lr"] * h["weight_decay"] * ratio,
        }
