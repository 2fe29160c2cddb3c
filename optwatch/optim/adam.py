"""Adam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim.optimizer import ParamsT

from optwatch.codecs import StateFormat
from optwatch.optim.base import Optimizer
from optwatch.optim.options import AT_LEAST_0, BETAS
from optwatch.rules import RULES, Rule


class Adam(Optimizer):
    """Adam with torch.optim.Adam's constructor: ``weight_decay`` is L2 unless ``decoupled_weight_decay`` is set.

    ``state``, ``seed``, ``backend`` and what is refused are as for :class:`optwatch.optim.AdamW`.
    """

    options = ("lr", "betas", "eps", "weight_decay", "maximize")
    ranges = (("lr", AT_LEAST_0), ("eps", AT_LEAST_0), ("weight_decay", AT_LEAST_0), ("betas", BETAS))

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        state: StateFormat = "fp32",
        weights: str = "native",
        seed: int = 0,
        backend: str | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str | None = None,
    ) -> None:
        super().__init__(params, locals())

    def rule_for(self, group: Mapping[str, Any]) -> Rule:
        """AdamW's with decoupled decay; the largest second moment is a third slot."""
        name = "adamw" if group["decoupled_weight_decay"] else "adam"
        return RULES[f"{name}_amsgrad" if group["amsgrad"] else name]
