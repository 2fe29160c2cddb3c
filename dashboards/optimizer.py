"""The dashboard "optwatch optimizer": one run in depth."""

from __future__ import annotations

from dashboards import state, training
from dashboards.board import Board

BOARD = Board(
    "optimizer",
    "One training run: step health, gradients, updates, and the error of storing optimizer state.",
    (
        training.OVERVIEW,
        training.HEALTH,
        training.REPORTED,
        state.GRADIENTS,
        state.UPDATES,
        state.STATE,
        state.BLOCKS,
    ),
)

#: Metrics that are on no panel of any dashboard, each with its reason.
EXEMPT: dict[str, str] = {
    "optwatch.replicas": "a divisor for queries over ranks, not a thing to look at",
}
