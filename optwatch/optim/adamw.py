"""AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim.optimizer import ParamsT

from optwatch.codecs import StateFormat
from optwatch.optim.base import Optimizer
from optwatch.optim.options import AT_LEAST_0, BETAS
from optwatch.rules import RULES, Rule


class AdamW(Optimizer):
    """AdamW with torch.optim.AdamW's constructor, and state in any format.

    ``state`` is the storage format of the moments: ``"fp32"``, ``"bf16"`` or ``"int8"`` (about 2.05 bytes a
    parameter instead of 8). ``weights`` is how bf16 parameters are kept: ``"native"``, ``"stochastic"``, ``"split8"``
    or ``"split16"``, see :mod:`optwatch.codecs.weights.codec`. Both may differ from group to group. ``seed`` keys the
    stochastic rounding and must be the same on all replicas. ``backend`` forces one of ``"triton"``, ``"cpu"`` and
    ``"reference"``.

    ``foreach`` and ``fused`` are accepted and change nothing: every step is fused. With ``capturable`` a step on a GPU
    can be part of a CUDA graph, and options may be tensors there: docs/optimizers.md. ``differentiable`` is refused.
    All of these are the same for all optimizers.
    """

    options = ("lr", "betas", "eps", "weight_decay", "maximize")
    ranges = (("lr", AT_LEAST_0), ("eps", AT_LEAST_0), ("weight_decay", AT_LEAST_0), ("betas", BETAS))

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state: StateFormat = "fp32",
        weights: str = "native",
        seed: int = 0,
        backend: str | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str | None = None,
    ) -> None:
        super().__init__(params, locals())

    def rule_for(self, group: Mapping[str, Any]) -> Rule:
        """The largest second moment is a third slot."""
        return RULES["adamw_amsgrad" if group["amsgrad"] else "adamw"]
