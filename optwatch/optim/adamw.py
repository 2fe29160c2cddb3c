"""AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim.optimizer import ParamsT

from optwatch.optim.base import Optimizer
from optwatch.rules import RULES


class AdamW(Optimizer):
    """AdamW with torch.optim.AdamW's constructor, and state in any format.

    ``state`` is the storage format of both moments: ``"fp32"``, ``"bf16"`` or ``"int8"`` (about 2.05 bytes a
    parameter instead of 8); it may differ from group to group. ``seed`` keys the stochastic rounding and must be the
    same on all replicas. ``backend`` forces one of ``"triton"``, ``"cpu"`` and ``"reference"``.

    ``foreach`` and ``fused`` are accepted and change nothing: every step is fused. ``amsgrad``, ``capturable`` and
    ``differentiable`` are refused.
    """

    rule = RULES["adamw"]
    options = ("lr", "betas", "eps", "weight_decay", "maximize")

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
        state: str = "fp32",
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, state=state, seed=seed, backend=backend)

    def check_options(self, group: Mapping[str, Any]) -> None:
        """The ranges that torch.optim.AdamW allows."""
        beta1, beta2 = group["betas"]
        for name, value, valid in (
            ("lr", group["lr"], group["lr"] >= 0),
            ("eps", group["eps"], group["eps"] >= 0),
            ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0),
            ("betas", group["betas"], 0 <= beta1 < 1 and 0 <= beta2 < 1),
        ):
            if not valid:
                raise ValueError(f"{name}={value!r} is out of range: expected " + _RANGES[name])
        for name in ("amsgrad", "capturable", "differentiable"):
            if group[name]:
                raise ValueError(f"{name}=True is not supported by optwatch.optim.AdamW; leave it False")


_RANGES = {"betas": "two numbers of [0, 1)"} | dict.fromkeys(
    ("lr", "eps", "weight_decay"), "a number of at least 0"
)
