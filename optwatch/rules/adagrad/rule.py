"""Adagrad (Duchi, Hazan and Singer, 2011, with a diagonal matrix) as torch.optim.Adagrad has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from optwatch.codecs.base import Kind
from optwatch.rules.base import CoupledDecay, Numbers, Slot


class Adagrad(CoupledDecay):
    """g = g + l2*w, s = s + g*g, w = w - lr / (1 + (step-1)*lr_decay) * g / (sqrt(s) + eps)."""

    name = "adagrad"
    slots = (Slot("sum", Kind.SECOND_MOMENT, initial="initial_accumulator_value"),)
    scalars = (
        "grad_scale",  # factor on the gradient: -1 to maximize
        "l2",  # weight_decay
        "eps",
        "step_size",  # lr / (1 + (step - 1) * lr_decay)
    )

    def prepare(self, options: Mapping[str, Numbers], step: Numbers) -> Numbers:
        """The rate decays from the second step on."""
        return self.columns(
            step,
            grad_scale=1 - 2 * options["maximize"],
            l2=options["weight_decay"],
            eps=options["eps"],
            step_size=options["lr"] / (1 + (step - 1) * options["lr_decay"]),
        )

    def step(
        self, state: Sequence[Tensor], grad: Tensor, weight: Tensor, h: Mapping[str, float]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The new sum, and the gradient over its root."""
        g = self.decayed(grad, weight, h)
        total = state[0] + g * g
        return (total,), self._over_root(total, g, h)

    def update(self, state: Sequence[Tensor], grad: Tensor, h: Mapping[str, float]) -> Tensor:
        """step_size * g / (sqrt(s) + eps), without the decay's part of g."""
        return self._over_root(state[0], grad * h["grad_scale"], h)

    @staticmethod
    def _over_root(total: Tensor, g: Tensor, h: Mapping[str, float]) -> Tensor:
        return g / (total.sqrt() + h["eps"]) * h["step_size"]
