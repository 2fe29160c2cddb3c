"""Sophia-G."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from optwatch.codecs import StateFormat
from optwatch.optim.base import Optimizer
from optwatch.optim.options import AT_LEAST_0, BETAS, MORE_THAN_0
from optwatch.rules import RULES


class SophiaG(Optimizer):
    """Sophia-G with the defaults of its authors' implementation; decay is decoupled.

    Every ten steps or so the loss is computed once more, with labels drawn from the model's own predictions, and its
    gradients are folded into the estimate of the Hessian::

        if step % 10 == 9:
            logits = model(inputs)
            labels = torch.distributions.Categorical(logits=logits).sample()
            F.cross_entropy(logits.flatten(0, -2), labels.flatten()).backward()
            optimizer.update_hessian()
            optimizer.zero_grad()

    Until the first fold a step moves every weight by ``lr``. ``bs`` is the number of tokens a batch has, which the
    authors pass to ``step``. ``rho`` is tuned by the *win rate*, the share of elements that are not clipped, which
    should lie between 0.1 and 0.5; a larger ``rho`` raises it::

        state = optimizer.dequantized_state(param)
        rate = (state["exp_avg"].abs() < rho * bs * state["hessian"]).float().mean()

    ``state``, ``seed`` and ``backend`` are as for :class:`optwatch.optim.AdamW`.
    """

    rule = RULES["sophiag"]
    options = ("lr", "betas", "rho", "weight_decay", "bs", "maximize")
    ranges = (
        ("lr", AT_LEAST_0),
        ("betas", BETAS),
        ("rho", AT_LEAST_0),
        ("weight_decay", AT_LEAST_0),
        ("bs", MORE_THAN_0),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 1e-1,
        *,
        bs: int = 5120,
        maximize: bool = False,
        capturable: bool = False,
        state: StateFormat = "fp32",
        weights: str = "native",
        seed: int = 0,
        backend: str | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str | None = None,
    ) -> None:
        super().__init__(params, locals())

    @torch.no_grad()
    def update_hessian(self) -> None:
        """Fold the squares of the current gradients into ``hessian``: b2*h + (1-b2)*g*g. Nothing else changes.

        It counts as no step and its statistics are not delivered.
        """
        self._run(False, fold=1.0)
