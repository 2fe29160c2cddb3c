"""Taking over a running torch.optim optimizer, with its state."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from optwatch.codecs import StateFormat
from optwatch.optim.adadelta import Adadelta
from optwatch.optim.adagrad import Adagrad
from optwatch.optim.adam import Adam
from optwatch.optim.adamw import AdamW
from optwatch.optim.base import Optimizer
from optwatch.optim.rmsprop import RMSprop
from optwatch.optim.sgd import SGD

#: What replaces which; a subclass is another optimizer and is not taken for its base.
SUCCESSORS: dict[type[torch.optim.Optimizer], Callable[..., Optimizer]] = {
    torch.optim.Adadelta: Adadelta,
    torch.optim.Adagrad: Adagrad,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
    torch.optim.RMSprop: RMSprop,
    torch.optim.SGD: SGD,
}


def replace(optimizer: torch.optim.Optimizer, state: StateFormat = "int8", **options: Any) -> Optimizer:
    """An optimizer of ours that goes on where ``optimizer`` is: same parameters, groups, options, and its state.

    The state is converted to the format ``state``; with ``"fp32"`` the run continues as it would have. ``options`` are
    the constructor's own, such as ``seed`` and ``backend``. The replaced optimizer must not be stepped any more, and
    what holds it (a scheduler, a scaler) has to be made again.

    Raises a ``TypeError`` for an optimizer that has no successor here, and what the constructor raises for options
    that it refuses. ``optimizer`` stays as it was.
    """
    successor = SUCCESSORS.get(type(optimizer))
    if successor is None:
        kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        known = ", ".join(f"torch.optim.{replaced.__name__}" for replaced in SUCCESSORS)
        raise TypeError(f"{kind} has no replacement in optwatch.optim; there is one for {known}")
    known_options = set(inspect.signature(successor).parameters)
    groups = []
    for group in optimizer.param_groups:
        names = group.get("param_names")
        params = list(zip(names, group["params"], strict=True)) if names else list(group["params"])
        groups.append(
            {"params": params, **{k: v for k, v in group.items() if k in known_options - {"params"}}}
        )
    made = successor(groups, state=state, **options)
    made.load_state_dict(optimizer.state_dict(), convert=True)
    return made
