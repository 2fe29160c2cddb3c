"""SGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim.optimizer import ParamsT

from optwatch.codecs import StateFormat
from optwatch.optim.base import Optimizer
from optwatch.optim.options import AT_LEAST_0
from optwatch.rules import RULES, Rule


class SGD(Optimizer):
    """SGD with torch.optim.SGD's constructor; without ``momentum`` it keeps nothing but the step count.

    ``state``, ``seed``, ``backend`` and what is refused are as for :class:`optwatch.optim.AdamW`.
    """

    options = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    ranges = (("lr", AT_LEAST_0), ("momentum", AT_LEAST_0), ("weight_decay", AT_LEAST_0))

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
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

    def rule_for(self, group: Mapping[str, Any]) -> Rule:
        """The buffer is a slot only where there is momentum."""
        return RULES["sgd_momentum" if group["momentum"] else "sgd"]

    def check_options(self, group: Mapping[str, Any]) -> None:
        """The ranges, and what Nesterov's form asks for."""
        super().check_options(group)
        if group["nesterov"] and (not group["momentum"] or group["dampening"]):
            raise ValueError(
                f"nesterov=True with momentum={group['momentum']!r} and dampening={group['dampening']!r}: expected a "
                "momentum greater than 0 and no dampening"
            )
