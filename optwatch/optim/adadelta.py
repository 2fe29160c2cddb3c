"""Adadelta."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from optwatch.codecs import StateFormat
from optwatch.optim.base import Optimizer
from optwatch.optim.options import AT_LEAST_0, UP_TO_1
from optwatch.rules import RULES


class Adadelta(Optimizer):
    """Adadelta with torch.optim.Adadelta's constructor.

    ``state``, ``seed``, ``backend`` and what is refused are as for :class:`optwatch.optim.AdamW`.
    """

    rule = RULES["adadelta"]
    options = ("lr", "rho", "eps", "weight_decay", "maximize")
    ranges = (("lr", AT_LEAST_0), ("rho", UP_TO_1), ("eps", AT_LEAST_0), ("weight_decay", AT_LEAST_0))

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        state: StateFormat = "fp32",
        weights: str = "native",
        seed: int = 0,
        backend: str | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str | None = None,
    ) -> None:
        super().__init__(params, locals())
