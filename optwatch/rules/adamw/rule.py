"""AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, 2019, algorithm 2), as torch.optim.AdamW has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from optwatch.codecs.base import Kind
from optwatch.rules.base import DecoupledDecay, Numbers, Slot, library, parts


class AdamW(DecoupledDecay):
    """m = b1*m + (1-b1)*g, v = b2*v + (1-b2)*g*g, w = w*(1-lr*decay) - lr/bc1 * m / (sqrt(v)/sqrt(bc2) + eps)."""

    name = "adamw"
    slots = (Slot("exp_avg", Kind.SIGNED), Slot("exp_avg_sq", Kind.SECOND_MOMENT))
    scalars: tuple[str, ...] = (
        "grad_scale",  # factor on the gradient: -1 to maximize
        "one_minus_beta1",
        "beta2",
        "one_minus_beta2",
        "eps",
        "step_size",  # lr / (1 - beta1**step)
        "inv_sqrt_bc2",  # 1 / sqrt(1 - beta2**step)
        "decay",  # 1 - lr * weight_decay
    )

    def prepare(self, options: Mapping[str, Numbers], step: Numbers) -> Numbers:
        """Bias corrections in float64: 1 - beta2**step loses three digits in fp32 at the first step."""
        beta1, beta2 = parts(options["betas"])
        return self.columns(
            step,
            grad_scale=1 - 2 * options["maximize"],
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            eps=options["eps"],
            step_size=options["lr"] / (1 - beta1**step),
            inv_sqrt_bc2=1 / library(step).sqrt(1 - beta2**step),
            decay=1 - options["lr"] * options["weight_decay"],
        )

    def step(
        self, state: Sequence[Tensor], grad: Tensor, weight: Tensor, h: Mapping[str, float]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """New first and second moment, and the update from them."""
        exp_avg, exp_avg_sq = state
        grad = grad * h["grad_scale"]
        new = (
            exp_avg + (grad - exp_avg) * h["one_minus_beta1"],
            exp_avg_sq * h["beta2"] + grad * grad * h["one_minus_beta2"],
        )
        return new, self.update(new, grad, h)

    def update(self, state: Sequence[Tensor], grad: Tensor, h: Mapping[str, float]) -> Tensor:
        """step_size * m / (sqrt(v) * inv_sqrt_bc2 + eps)."""
        exp_avg, exp_avg_sq = state
        return exp_avg / (exp_avg_sq.sqrt() * h["inv_sqrt_bc2"] + h["eps"]) * h["step_size"]
