"""Lion."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from optwatch.codecs import StateFormat
from optwatch.optim.base import Optimizer
from optwatch.optim.options import AT_LEAST_0, BETAS
from optwatch.rules import RULES


class Lion(Optimizer):
    """Lion with the constructor and defaults of its authors' implementation; decay is decoupled.

    Every weight moves by ``lr``: the paper takes a rate 3 to 10 times smaller than AdamW's and a decay as much larger.
    ``state``, ``seed`` and ``backend`` are as for :class:`optwatch.optim.AdamW`.
    """

    rule = RULES["lion"]
    options = ("lr", "betas", "weight_decay", "maximize")
    ranges = (("lr", AT_LEAST_0), ("betas", BETAS), ("weight_decay", AT_LEAST_0))

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
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
