"""RMSprop (Hinton, 2012, lecture 6e) as torch.optim.RMSprop has it; centered after Graves (2013, equation 40)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optwatch.codecs.base import Kind
from optwatch.rules.base import CoupledDecay, Numbers, Slot, library


class RMSprop(CoupledDecay):
    """g = g + l2*w, s = a*s + (1-a)*g*g, w = w - lr * g / (sqrt(s) + eps).

    ``centered`` keeps the mean m of g, too, and takes s - m*m under the root. ``momentum`` keeps
    b = momentum*b + g / (root + eps) and takes lr*b as the update. Signed slots come first: the first one is the
    moment that is compared with the gradient.
    """

    def __init__(self, *, centered: bool, momentum: bool) -> None:
        self.centered, self.momentum = centered, momentum
        self.name = "rmsprop" + "_centered" * centered + "_momentum" * momentum
        self.slots = (
            *(Slot("momentum_buffer", Kind.SIGNED),) * momentum,
            *(Slot("grad_avg", Kind.SIGNED),) * centered,
            Slot("square_avg", Kind.SECOND_MOMENT),
        )
        self.scalars = (
            "grad_scale",  # factor on the gradient: -1 to maximize
            "l2",  # weight_decay
            "alpha",
            "one_minus_alpha",
            "odds",  # (1 - alpha) / alpha, or 0 where alpha is
            "eps",
            "momentum",
            "lr",
        )

    def prepare(self, options: Mapping[str, Numbers], step: Numbers) -> Numbers:
        """Nothing depends on the step."""
        alpha = options["alpha"]
        return self.columns(
            step,
            grad_scale=1 - 2 * options["maximize"],
            l2=options["weight_decay"],
            alpha=alpha,
            one_minus_alpha=1 - alpha,
            odds=(1 - alpha) / library(step).where(alpha > 0, alpha, math.inf),
            eps=options["eps"],
            momentum=options["momentum"],
            lr=options["lr"],
        )

    def step(
        self, state: Sequence[Tensor], grad: Tensor, weight: Tensor, h: Mapping[str, float]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """New averages, and the normalised gradient or its sum."""
        *signed, square_avg = state
        g = self.decayed(grad, weight, h)
        square_avg = square_avg * h["alpha"] + g * g * h["one_minus_alpha"]
        averages: tuple[Tensor, ...] = (square_avg,)
        if self.centered:
            grad_avg = signed.pop()
            averages = (grad_avg + (g - grad_avg) * h["one_minus_alpha"], square_avg)
        normalised = self._normalised(averages, g, h)
        if not self.momentum:
            return averages, normalised * h["lr"]
        buffer = signed.pop() * h["momentum"] + normalised
        return (buffer, *averages), buffer * h["lr"]

    def update(self, state: Sequence[Tensor], grad: Tensor, h: Mapping[str, float]) -> Tensor:
        """lr*b, or lr*g / (root + eps) without the decay's part of g."""
        if self.momentum:
            return state[0] * h["lr"]
        return self._normalised(state, grad * h["grad_scale"], h) * h["lr"]

    def _normalised(self, averages: Sequence[Tensor], g: Tensor, h: Mapping[str, float]) -> Tensor:
        """The gradient g over root + eps.

        s - m*m is the variance of g and, because g is one of its samples, at least odds * (g - m)**2. Rounding in
        s and m, which in low-bit state is coarse, would take it below that, and below zero.
        """
        square = averages[-1]
        if self.centered:
            away = g - averages[0]
            square = torch.maximum(square - averages[0] * averages[0], away * away * h["odds"])
        return g / (square.sqrt() + h["eps"])
