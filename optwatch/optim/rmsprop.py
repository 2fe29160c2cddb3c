"""RMSprop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim.optimizer import ParamsT

from optwatch.codecs import StateFormat
from optwatch.optim.base import Optimizer
from optwatch.optim.options import AT_LEAST_0, UP_TO_1
from optwatch.rules import RULES, Rule


class RMSprop(Optimizer):
    """RMSprop with torch.optim.RMSprop's constructor; ``centered`` and ``momentum`` each keep a slot more.

    ``state``, ``seed``, ``backend`` and what is refused are as for :class:`optwatch.optim.AdamW`.
    """

    options = ("lr", "alpha", "eps", "weight_decay", "momentum", "maximize")
    ranges = (
        ("lr", AT_LEAST_0),
        ("alpha", UP_TO_1),
        ("eps", AT_LEAST_0),
        ("weight_decay", AT_LEAST_0),
        ("momentum", AT_LEAST_0),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        state: StateFormat = "fp32",
        weights: str = "native",
        seed: int = 0,
        backend: str | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str | None = None,
    ) -> None:
        super().__init__(params, locals())

    def rule_for(self, group: Mapping[str, Any]) -> Rule:
        """By the slots that the options ask for."""
        centered, momentum = bool(group["centered"]), bool(group["momentum"])
        return RULES["rmsprop" + "_centered" * centered + "_momentum" * momentum]
