"""Sophia-G (Liu et al., 2023, algorithms 2 and 3), after the authors' implementation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from optwatch.codecs.base import Kind
from optwatch.rules.base import DecoupledDecay, Slot


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

    def prepare(
        self, options: Mapping[str, NDArray[np.float64]], step: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """The scalars of a step, or those of a fold."""
        beta1, beta2 = options["betas"].T
        fold = "fold" in options
        return self.columns(
            len(step),
            grad_scale=1 - 2 * options["maximize"],
            one_minus_beta1=np.where(fold, 0, 1 - beta1),
            beta2=np.where(fold, beta2, 1),
            fold_scale=np.where(fold, np.sqrt(1 - beta2), 0),
            curvature=options["rho"] * options["bs"],
            lr=np.where(fold, 0, options["lr"]),
            decay=np.where(fold, 1, 1 - options["lr"] * options["weight_decay"]),
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
