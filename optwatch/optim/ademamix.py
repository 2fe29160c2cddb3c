"""AdEMAMix."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from optwatch.codecs import StateFormat
from optwatch.optim.base import Optimizer
from optwatch.optim.options import AT_LEAST_0, BETAS3, STEPS
from optwatch.rules import RULES


class AdEMAMix(Optimizer):
    """AdEMAMix with the constructor and defaults of Apple's implementation (bitsandbytes has alpha 5 and decay 0.01).

    ``alpha`` weighs the slow average (``betas[2]``), which is not bias-corrected. ``alpha_warmup`` and
    ``beta3_warmup`` are numbers of steps: alpha rises from 0 on a line, beta3 from ``betas[0]`` so that its half-life
    does. The paper takes the number of all steps for both, and an alpha of 5 to 10 for language models.
    ``state``, ``seed`` and ``backend`` are as for :class:`optwatch.optim.AdamW`.
    """

    rule = RULES["ademamix"]
    options = ("lr", "betas", "alpha", "beta3_warmup", "alpha_warmup", "eps", "weight_decay", "maximize")
    ranges = (
        ("lr", AT_LEAST_0),
        ("betas", BETAS3),
        ("alpha", AT_LEAST_0),
        ("beta3_warmup", STEPS),
        ("alpha_warmup", STEPS),
        ("eps", AT_LEAST_0),
        ("weight_decay", AT_LEAST_0),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: int | None = None,
        alpha_warmup: int | None = None,
        eps: float = 1e-8,
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
