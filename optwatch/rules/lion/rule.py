"""Lion (Chen et al., 2023, "Symbolic discovery of optimization algorithms", program 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from optwatch.codecs.base import Kind
from optwatch.rules.base import DecoupledDecay, Numbers, Slot, library, parts


class Lion(DecoupledDecay):
    """u = lr * sign(b1*m + (1-b1)*g), m = b2*m + (1-b2)*g, w = w*(1-lr*decay) - u; sign(0) is 0."""

    name = "lion"
    slots = (Slot("exp_avg", Kind.SIGNED),)
    scalars = (
        "grad_scale",  # factor on the gradient: -1 to maximize
        "one_minus_beta1",
        "one_minus_beta2",
        "moment_share",  # beta1 / beta2, or 0 where beta2 is
        "grad_share",  # (beta2 - beta1) / beta2, or 1
        "lr",
        "decay",  # 1 - lr * weight_decay
    )

    def prepare(self, options: Mapping[str, Numbers], step: Numbers) -> Numbers:
        """Nothing depends on the step."""
        beta1, beta2 = parts(options["betas"])
        share = beta1 / library(step).where(beta2 > 0, beta2, math.inf)  # 0 where there is none
        return self.columns(
            step,
            grad_scale=1 - 2 * options["maximize"],
            one_minus_beta1=1 - beta1,
            one_minus_beta2=1 - beta2,
            moment_share=share,
            grad_share=1 - share,
            lr=options["lr"],
            decay=1 - options["lr"] * options["weight_decay"],
        )

    def step(
        self, state: Sequence[Tensor], grad: Tensor, weight: Tensor, h: Mapping[str, float]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The new moment, and the sign of another average of the old one and the gradient."""
        (exp_avg,) = state
        away = grad * h["grad_scale"] - exp_avg
        direction = exp_avg + away * h["one_minus_beta1"]
        return (exp_avg + away * h["one_minus_beta2"],), direction.sign() * h["lr"]

    def update(self, state: Sequence[Tensor], grad: Tensor, h: Mapping[str, float]) -> Tensor:
        """The sign, times lr, of b1/b2*m' + (b2-b1)/b2*g: the old moment expressed by the new one.

        Where b1*m + (1-b1)*g nearly cancels, rounding may give it the other sign than :meth:`step` saw.
        """
        direction = state[0] * h["moment_share"] + grad * h["grad_scale"] * h["grad_share"]
        return direction.sign() * h["lr"]
