"""Optimizers: drop-in for torch.optim, with their state in any storage format."""

from __future__ import annotations

from optwatch.optim.adamw import AdamW
from optwatch.optim.base import Optimizer, StateKind
from optwatch.optim.stats import PlanStats, StatsLayout, StepStats

__all__ = ["AdamW", "Optimizer", "PlanStats", "StateKind", "StatsLayout", "StepStats"]
