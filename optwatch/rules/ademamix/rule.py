"""AdEMAMix (Pagliardini, Ablin and Grangier, 2024, algorithm 1), with its schedules of alpha and beta3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from optwatch.codecs.base import Kind
from optwatch.rules.base import DecoupledDecay, Numbers, Slot, library, parts


class AdEMAMix(DecoupledDecay):
    """AdamW's m and v, a slow average n = b3*n + (1-b3)*g, and u = lr * (m/bc1 + alpha*n) / (sqrt(v)/sqrt(bc2) + eps).

    n is not bias-corrected: it starts at nothing and grows with the schedules.
    """

    name = "ademamix"
    slots = (
        Slot("exp_avg", Kind.SIGNED),
        Slot("exp_avg_slow", Kind.SIGNED),
        Slot("exp_avg_sq", Kind.SECOND_MOMENT),
    )
    scalars = (
        "grad_scale",  # factor on the gradient: -1 to maximize
        "one_minus_beta1",
        "one_minus_beta3",  # of this step
        "beta2",
        "one_minus_beta2",
        "eps",
        "step_size",  # lr / (1 - beta1**step)
        "slow_size",  # lr * alpha of this step
        "inv_sqrt_bc2",  # 1 / sqrt(1 - beta2**step)
        "decay",  # 1 - lr * weight_decay
    )

    def prepare(self, options: Mapping[str, Numbers], step: Numbers) -> Numbers:
        """A warm-up of NaN steps (None) is none."""
        beta1, beta2, beta3 = parts(options["betas"])
        lr = options["lr"]
        alpha = options["alpha"] * _ramp(step, options["alpha_warmup"])
        return self.columns(
            step,
            grad_scale=1 - 2 * options["maximize"],
            one_minus_beta1=1 - beta1,
            one_minus_beta3=1 - slow_beta(beta1, beta3, _ramp(step, options["beta3_warmup"])),
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            eps=options["eps"],
            step_size=lr / (1 - beta1**step),
            slow_size=lr * alpha,
            inv_sqrt_bc2=1 / library(step).sqrt(1 - beta2**step),
            decay=1 - lr * options["weight_decay"],
        )

    def step(
        self, state: Sequence[Tensor], grad: Tensor, weight: Tensor, h: Mapping[str, float]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """New moments, and the update from them."""
        exp_avg, exp_avg_slow, exp_avg_sq = state
        g = grad * h["grad_scale"]
        new = (
            exp_avg + (g - exp_avg) * h["one_minus_beta1"],
            exp_avg_slow + (g - exp_avg_slow) * h["one_minus_beta3"],
            exp_avg_sq * h["beta2"] + g * g * h["one_minus_beta2"],
        )
        return new, self.update(new, grad, h)

    def update(self, state: Sequence[Tensor], grad: Tensor, h: Mapping[str, float]) -> Tensor:
        """(step_size*m + slow_size*n) / (sqrt(v) * inv_sqrt_bc2 + eps)."""
        exp_avg, exp_avg_slow, exp_avg_sq = state
        mixed = exp_avg * h["step_size"] + exp_avg_slow * h["slow_size"]
        return mixed / (exp_avg_sq.sqrt() * h["inv_sqrt_bc2"] + h["eps"])


def _ramp(step: Numbers, warmup: Numbers) -> Numbers:
    """From 0 to 1 in ``warmup`` steps."""
    rising, where = step < warmup, library(step).where
    return where(rising, step, 1.0) / where(rising, warmup, 1.0)


def slow_beta(beta1: Numbers, beta3: Numbers, ramp: Numbers) -> Numbers:
    """The beta3 of a step whose half-life lies ``ramp`` of the way from beta1's to beta3's.

    A half-life is ln(1/2)/ln(beta), so what moves on a line is 1/ln(beta); an average without memory has beta 0.
    """
    maths = library(ramp)
    with np.errstate(divide="ignore"):
        slowness = (1 - ramp) / maths.log(beta1) + ramp / maths.log(beta3)
        return maths.where(ramp < 1, maths.exp(maths.reciprocal(slowness)), beta3)
