"""The scalars of a step of an optimizer whose rule is known, as a kernel of ours would be given them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optwatch.hooks.adapters import Adapter, Math


def maths_of(adapter: Adapter, optimizer: torch.optim.Optimizer) -> list[Math] | None:
    """The rule and the options of each parameter group; None if one is unknown or an option lies on a device."""
    maths = []
    for group in optimizer.param_groups:
        math = adapter.math(optimizer, group)
        numbers = None if math is None else _numbers(math.options)
        if math is None or numbers is None or math.rule.norms:
            return None  # blocks know nothing of the norms of whole tensors
        maths.append(Math(math.rule, numbers))
    return maths


def step_of(state: Mapping[str, Any], otherwise: float) -> float | None:
    """The number of the newest step of a parameter, from 1; None if it lies on a device."""
    step = state.get("step", otherwise)
    if isinstance(step, Tensor):
        return float(step) if step.device.type == "cpu" else None
    return float(step)


def scalars(maths: Sequence[Math], steps: Sequence[float]) -> NDArray[np.float32]:
    """The scalars ``[n, len(rule.scalars)]`` of ``n`` parameters with these options, all of one rule."""
    options = {
        name: np.array([math.options[name] for math in maths], np.float64) for name in maths[0].options
    }
    made: NDArray[np.float32] = maths[0].rule.prepare(options, np.maximum(np.array(steps, np.float64), 1.0))
    return made


def _numbers(options: Mapping[str, Any]) -> dict[str, float | tuple[float, ...]] | None:
    """The options that are numbers, or tuples of them."""
    found: dict[str, float | tuple[float, ...]] = {}
    for name, value in options.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            if value.device.type != "cpu":
                return None
            found[name] = float(value)
        elif value is None or isinstance(value, int | float):
            found[name] = float("nan") if value is None else float(value)
        elif isinstance(value, tuple) and all(isinstance(v, int | float) for v in value):
            found[name] = tuple(float(v) for v in value)
    return found
