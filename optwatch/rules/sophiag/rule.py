"""Sophia-G (Liu et al., 2023, algorithms 2 and 3), after the authors' implementation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from optwatch.codecs.base import Kind
from optwatch.rules.base import DecoupledDecay, Numbers, Slot, library, parts


class SophiaG(DecoupledDecay):
    """m = b1*m + (1-b1)*g, w = w*(1-lr*decay) - lr * clip(m / (rho*bs*h + 1e-15), -1, 1).

    h estimates the diagonal of the Hessian. It changes only where there is an option ``fold``: then gradients of a
    loss with labels drawn from the model's own predictions are folded into it, h = b2*h + (1-b2)*g*g, and the rest
    stays. Both are one formula with other scalars, and so one kernel.
    """

    name = "sophiag"
    slots = (Slot("exp_avg", Kind.SIGNED), Slot("hessian", Kind.SECOND_MOMENT))
    scalars = (
        "grad_scale",  # factor on the gradient: -1 to maximize
        "one_minus_beta1",  # 0 to fold
        "beta2",  # 1 unless to fold
        "fold_scale",  # factor on the gradient before it is squared: sqrt(1 - beta2) to fold, else 0
        "curvature",  # rho * bs
        "lr",  # 0 to fold
        "decay",  # 1 - lr * weight_decay, or 1 to fold
    )

    def prepare(self, options: Mapping[str, Numbers], step: Numbers) -> Numbers:
        """The scalars of a step, or those of a fold."""
        beta1, beta2 = parts(options["betas"])
        fold = "fold" in options
        return self.columns(
            step,
            grad_scale=1 - 2 * options["maximize"],
            one_minus_beta1=(1 - beta1) * (not fold),
            beta2=beta2 ** int(fold),
            fold_scale=library(step).sqrt(1 - beta2) * fold,
            curvature=options["rho"] * options["bs"],
            lr=options["lr"] * (not fold),
            decay=1 - options["lr"] * options["weight_decay"] * (not fold),
        )

    def step(
        self, state: Sequence[Tensor], grad: Tensor, weight: Tensor, h: Mapping[str, float]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The new moment and Hessian, and the clipped ratio of the two."""
        exp_avg, hessian = state
        g = grad * h["grad_scale"]
        folded = g * h["fold_scale"]
        new = (exp_avg + (g - exp_avg) * h["one_minus_beta1"], hessian * h["beta2"] + folded * folded)
        return new, self.update(new, grad, h)

    def update(self, state: Sequence[Tensor], grad: Tensor, h: Mapping[str, float]) -> Tensor:
        """The clipped ratio times lr: a sign where there is no curvature."""
        exp_avg, hessian = state
        return (exp_avg / (hessian * h["curvature"] + 1e-15)).clamp(-1, 1) * h["lr"]
