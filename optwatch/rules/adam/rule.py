"""Adam (Kingma and Ba, 2015, algorithm 1) with L2 decay, as torch.optim.Adam has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from optwatch.codecs.base import Kind
from optwatch.rules.base import CoupledDecay, Numbers, Slot, library, parts


class Adam(CoupledDecay):
    """g = g + l2*w, m = b1*m + (1-b1)*g, v = b2*v + (1-b2)*g*g, w = w - lr/bc1 * m / (sqrt(v)/sqrt(bc2) + eps)."""

    name = "adam"
    slots = (Slot("exp_avg", Kind.SIGNED), Slot("exp_avg_sq", Kind.SECOND_MOMENT))
    scalars = (
        "grad_scale",  # factor on the gradient: -1 to maximize
        "l2",  # weight_decay
        "one_minus_beta1",
        "beta2",
        "one_minus_beta2",
        "eps",
        "step_size",  # lr / (1 - beta1**step)
        "inv_sqrt_bc2",  # 1 / sqrt(1 - beta2**step)
    )

    def prepare(self, options: Mapping[str, Numbers], step: Numbers) -> Numbers:
        """Bias corrections in float64."""
        beta1, beta2 = parts(options["betas"])
        return self.columns(
            step,
            grad_scale=1 - 2 * options["maximize"],
            l2=options["weight_decay"],
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            eps=options["eps"],
            step_size=options["lr"] / (1 - beta1**step),
            inv_sqrt_bc2=1 / library(step).sqrt(1 - beta2**step),
        )

    def step(
        self, state: Sequence[Tensor], grad: Tensor, weight: Tensor, h: Mapping[str, float]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """New first and second moment, and the update from them."""
        exp_avg, exp_avg_sq = state
        g = self.decayed(grad, weight, h)
        new = (
            exp_avg + (g - exp_avg) * h["one_minus_beta1"],
            exp_avg_sq * h["beta2"] + g * g * h["one_minus_beta2"],
        )
        return new, self.update(new, grad, h)

    def update(self, state: Sequence[Tensor], grad: Tensor, h: Mapping[str, float]) -> Tensor:
        """step_size * m / (sqrt(v) * inv_sqrt_bc2 + eps)."""
        exp_avg, exp_avg_sq = state
        return exp_avg / (exp_avg_sq.sqrt() * h["inv_sqrt_bc2"] + h["eps"]) * h["step_size"]
