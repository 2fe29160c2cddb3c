"""Optimizers: drop-in for torch.optim, with their state in any storage format."""

from __future__ import annotations

from optwatch.optim.adadelta import Adadelta
from optwatch.optim.adagrad import Adagrad
from optwatch.optim.adam import Adam
from optwatch.optim.adamw import AdamW
from optwatch.optim.ademamix import AdEMAMix
from optwatch.optim.base import Optimizer
from optwatch.optim.count import StateKind
from optwatch.optim.lamb import LAMB
from optwatch.optim.lion import Lion
from optwatch.optim.replace import replace
from optwatch.optim.rmsprop import RMSprop
from optwatch.optim.sgd import SGD
from optwatch.optim.sophiag import SophiaG
from optwatch.optim.stats import PlanStats, StatsLayout, StepStats

__all__ = [
    "LAMB",
    "SGD",
    "AdEMAMix",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "Optimizer",
    "PlanStats",
    "RMSprop",
    "SophiaG",
    "StateKind",
    "StatsLayout",
    "StepStats",
    "replace",
]
