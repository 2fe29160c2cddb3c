"""SGD as torch.optim.SGD has it: L2 decay, momentum, dampening and Nesterov's form (Sutskever et al., 2013)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from optwatch.codecs.base import Kind
from optwatch.rules.base import CoupledDecay, Numbers, Slot, library


class SGD(CoupledDecay):
    """g = g + l2*w, w = w - lr*g: a rule that keeps nothing."""

    name = "sgd"
    slots = ()
    stepless = True
    scalars = (
        "grad_scale",  # factor on the gradient: -1 to maximize
        "l2",  # weight_decay
        "lr",
    )

    def prepare(self, options: Mapping[str, Numbers], step: Numbers) -> Numbers:
        """Nothing depends on the step."""
        return self.columns(
            step,
            grad_scale=1 - 2 * options["maximize"],
            l2=options["weight_decay"],
            lr=options["lr"],
        )

    def step(
        self, state: Sequence[Tensor], grad: Tensor, weight: Tensor, h: Mapping[str, float]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """No state, and lr*g."""
        return (), self.decayed(grad, weight, h) * h["lr"]

    def update(self, state: Sequence[Tensor], grad: Tensor, h: Mapping[str, float]) -> Tensor:
        """lr*g, without the decay's part of g."""
        return grad * h["grad_scale"] * h["lr"]


class SGDMomentum(CoupledDecay):
    """g = g + l2*w, b = momentum*b + (1-dampening)*g, w = w - lr*b, or w - lr*(g + momentum*b) in Nesterov's form."""

    name = "sgd_momentum"
    slots = (Slot("momentum_buffer", Kind.SIGNED),)
    stepless = True
    scalars = (
        "grad_scale",  # factor on the gradient: -1 to maximize
        "l2",  # weight_decay
        "momentum",
        "fresh",  # weight of the gradient in b: 1 - dampening, but 1 in the first step
        "direct",  # factor on the gradient in the update: 1 in Nesterov's form, else 0
        "through",  # factor on b in the update: momentum in Nesterov's form, else 1
        "lr",
    )

    def prepare(self, options: Mapping[str, Numbers], step: Numbers) -> Numbers:
        """The buffer starts with the first gradient, which dampening does not touch."""
        nesterov, where = options["nesterov"] != 0, library(step).where
        return self.columns(
            step,
            grad_scale=1 - 2 * options["maximize"],
            l2=options["weight_decay"],
            momentum=options["momentum"],
            fresh=where(step == 1, 1.0, 1 - options["dampening"]),
            direct=nesterov,
            through=where(nesterov, options["momentum"], 1.0),
            lr=options["lr"],
        )

    def step(
        self, state: Sequence[Tensor], grad: Tensor, weight: Tensor, h: Mapping[str, float]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The new buffer, and the update from it and the gradient."""
        (buffer,) = state
        g = self.decayed(grad, weight, h)
        buffer = buffer * h["momentum"] + g * h["fresh"]
        return (buffer,), (g * h["direct"] + buffer * h["through"]) * h["lr"]

    def update(self, state: Sequence[Tensor], grad: Tensor, h: Mapping[str, float]) -> Tensor:
        """lr*(direct*g + through*b); the decay's part of g is in b only, and cancels where two updates are compared."""
        (buffer,) = state
        return (grad * h["grad_scale"] * h["direct"] + buffer * h["through"]) * h["lr"]
