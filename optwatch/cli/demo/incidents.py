"""The incidents that the demo can show: what breaks many a run, done to this one half-way."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from optwatch.cli.demo.resume import resume_as_fp32
from optwatch.optim import Optimizer

LEAK = 1 << 30  # bytes; then the leak ends, to spare the machine


class Incident(NamedTuple):
    """What happens, told in a line; ``strike`` is called between backward() and step()."""

    story: str
    strike: Callable[[torch.nn.Module, Optimizer], None]
    again: bool = False  # at every step from then on


def _not_a_number(model: torch.nn.Module, _: Optimizer) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(torch.nan)


_kept: list[Tensor] = []


def _leak(model: torch.nn.Module, _: Optimizer) -> None:
    held = sum(gradient.numel() * gradient.element_size() for gradient in _kept)
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    if held < LEAK:
        _kept.extend(p.grad.clone() for p in blocks[0].parameters() if p.grad is not None)


#: What ``--inject`` names.
INCIDENTS = {
    "fp32-resume": Incident("checkpoint saved, and resumed the way stock PyTorch does.", resume_as_fp32),
    "nan-loss": Incident("a batch comes whose loss, and so every gradient, is not a number.", _not_a_number),
    "leak": Incident(
        "from now on the loop keeps one block's gradients of each step, for a plot that nobody draws.",
        _leak,
        again=True,
    ),
}
