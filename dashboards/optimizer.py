"""The dashboard "optwatch optimizer": one run in depth."""

from __future__ import annotations

from dashboards import state, training
from dashboards.board import Board

BOARD = Board(
    "optimizer",
    "One training run: step health, gradients, updates, and the error of storing optimizer state.",
    (training.OVERVIEW, training.HEALTH, state.GRADIENTS, state.UPDATES, state.STATE),
)

#: Metrics that are on no panel of any dashboard, each with its reason.
EXEMPT: dict[str, str] = {
    "optwatch.estimated_update_quantization_error.ratio": "only of optimizers that are not optwatch's",
    "optwatch.estimated_quantization_error.ratio": "only of optimizers that are not optwatch's",
    "optwatch.shadow_update_error.ratio": "only of runs with shadow=",
    "optwatch.shadow_moment_error.ratio": "only of runs with shadow=",
    "optwatch.adapter_errors": "0 unless an adapter fails, which the training process says itself",
    "optwatch.scalar": "its names are the training loop's own: a panel of them is made by hand",
    "optwatch.events": "annotations show when each happened; the count is for queries of one's own",
    "optwatch.replicas": "a divisor for queries over ranks, not a thing to look at",
    "optwatch.training.tokens": "not every loop counts them: a panel without data would be no use",
    "optwatch.training.samples": "not every loop counts them: a panel without data would be no use",
    "optwatch.gradient.norm_before_clipping": "only of optimizers that clip; the norms of the groups show the same",
    "optwatch.gradient_clip.ratio": "only of optimizers that clip",
}
