"""Adadelta (Zeiler, 2012, algorithm 1) as torch.optim.Adadelta has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from optwatch.codecs.base import Kind
from optwatch.rules.base import CoupledDecay, Numbers, Slot


class Adadelta(CoupledDecay):
    """g = g + l2*w, s = r*s + (1-r)*g*g, d = sqrt(a+eps) / sqrt(s+eps) * g, a = r*a + (1-r)*d*d, w = w - lr*d."""

    name = "adadelta"
    slots = (Slot("square_avg", Kind.SECOND_MOMENT), Slot("acc_delta", Kind.SECOND_MOMENT))
    scalars = (
        "grad_scale",  # factor on the gradient: -1 to maximize
        "l2",  # weight_decay
        "rho",
        "one_minus_rho",
        "eps",
        "lr",
    )

    def prepare(self, options: Mapping[str, Numbers], step: Numbers) -> Numbers:
        """Nothing depends on the step."""
        return self.columns(
            step,
            grad_scale=1 - 2 * options["maximize"],
            l2=options["weight_decay"],
            rho=options["rho"],
            one_minus_rho=1 - options["rho"],
            eps=options["eps"],
            lr=options["lr"],
        )

    def step(
        self, state: Sequence[Tensor], grad: Tensor, weight: Tensor, h: Mapping[str, float]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """New averages of g*g and d*d, and d times lr: d follows from the average of the steps before."""
        square_avg, acc_delta = state
        g = self.decayed(grad, weight, h)
        square_avg = square_avg * h["rho"] + g * g * h["one_minus_rho"]
        delta = (acc_delta + h["eps"]).sqrt() / (square_avg + h["eps"]).sqrt() * g
        acc_delta = acc_delta * h["rho"] + delta * delta * h["one_minus_rho"]
        return (square_avg, acc_delta), delta * h["lr"]

    def update(self, state: Sequence[Tensor], grad: Tensor, h: Mapping[str, float]) -> Tensor:
        """lr*d, without the decay's part of g.

        The old a that d is computed from satisfies both lines of :meth:`step`; with it eliminated,
        d = g * sqrt((a' + r*eps) / (r*(s' + eps) + (1-r)*g*g)).
        """
        square_avg, acc_delta = state
        g = grad * h["grad_scale"]
        below = (square_avg + h["eps"]) * h["rho"] + g * g * h["one_minus_rho"]
        return ((acc_delta + h["rho"] * h["eps"]) / below).sqrt() * g * h["lr"]
