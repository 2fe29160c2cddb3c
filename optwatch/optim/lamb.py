"""LAMB."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from optwatch.codecs import StateFormat
from optwatch.optim.base import Optimizer
from optwatch.optim.options import AT_LEAST_0, BETAS
from optwatch.rules import RULES


class LAMB(Optimizer):
    """LAMB: AdamW's direction with a rate for each tensor, lr times the norm of its weights over that of the direction.

    The ratio is exact in every state format: a first pass reads the state and sums, only the second one stores.

    ``bias_correction`` corrects the moments as Adam does; ``trust_clip`` keeps the ratio at 1 or below;
    ``always_adapt=False`` leaves groups without weight decay (biases, norms) at the ratio 1, as Nvidia's and timm's do.
    ``state``, ``seed`` and ``backend`` are as for :class:`optwatch.optim.AdamW`.
    """

    rule = RULES["lamb"]
    options = (
        "lr", "betas", "eps", "weight_decay", "bias_correction", "trust_clip", "always_adapt", "maximize"
    )  # fmt: skip
    ranges = (("lr", AT_LEAST_0), ("betas", BETAS), ("eps", AT_LEAST_0), ("weight_decay", AT_LEAST_0))

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        bias_correction: bool = True,
        trust_clip: bool = False,
        always_adapt: bool = True,
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
