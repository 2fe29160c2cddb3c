"""Adagrad."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from optwatch.codecs import StateFormat
from optwatch.optim.base import Optimizer
from optwatch.optim.options import AT_LEAST_0
from optwatch.rules import RULES


class Adagrad(Optimizer):
    """Adagrad with torch.optim.Adagrad's constructor; the sum is created at the first step, not in the constructor.

    ``state``, ``seed``, ``backend`` and what is refused are as for :class:`optwatch.optim.AdamW`.
    """

    rule = RULES["adagrad"]
    options = ("lr", "lr_decay", "weight_decay", "eps", "maximize")
    ranges = (
        ("lr", AT_LEAST_0),
        ("lr_decay", AT_LEAST_0),
        ("weight_decay", AT_LEAST_0),
        ("initial_accumulator_value", AT_LEAST_0),
        ("eps", AT_LEAST_0),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state: StateFormat = "fp32",
        weights: str = "native",
        seed: int = 0,
        backend: str | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str | None = None,
        capturable: bool = False,
    ) -> None:
        super().__init__(params, locals())
