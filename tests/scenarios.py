"""Synthetic gradients that are hard on storage formats, and the runs that compare an optimizer with exact fp32.

Each scenario draws one element's gradient as (its size) * N(0, 1): sizes may be spread log-normally over the
elements, change at some step, or be silent for most rows and steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ELEMENTS = 4096
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class Scenario(NamedTuple):
    """How gradients are drawn, and the error of the update that state="int8" may reach."""

    spread: float  # of log |g| across elements
    scale: float
    steps: int
    change: int | None  # the step after which the sizes are others
    silent: float  # the share of rows of 64 without a gradient, drawn anew each step
    limit: float  # nrmse


SCENARIOS = {
    "uniform_1e-4": Scenario(0.0, 1e-4, 600, None, 0.0, 0.02),
    "uniform_1e-6": Scenario(0.0, 1e-6, 600, None, 0.0, 0.02),
    "heavy_tail": Scenario(1.5, 1e-4, 600, None, 0.0, 0.12),
    "heavy_tail_shift": Scenario(1.5, 1e-4, 3000, 1000, 0.0, 0.12),
    "half_drops_30x": Scenario(0.0, 1e-4, 3000, 600, 0.0, 0.05),
    "sparse_rows": Scenario(0.5, 1e-4, 2000, None, 0.98, 0.03),
}


def gradients(scenario: Scenario) -> Iterator[Tensor]:
    """The gradients, step by step, always the same."""
    gen = torch.Generator().manual_seed(1)
    before = torch.exp(scenario.spread * torch.randn(ELEMENTS, generator=gen))
    after = torch.exp(scenario.spread * torch.randn(ELEMENTS, generator=gen))
    if scenario is SCENARIOS["half_drops_30x"]:
        after = torch.where(torch.rand(ELEMENTS, generator=gen) < 0.5, before / 30, before)
    for step in range(1, scenario.steps + 1):
        size = after if scenario.change and step > scenario.change else before
        grad = scenario.scale * size * torch.randn(ELEMENTS, generator=gen)
        if scenario.silent:
            heard = torch.rand(ELEMENTS // 64, 1, generator=gen) > scenario.silent
            grad = (grad.view(-1, 64) * heard).view(-1)
        yield grad


class Comparison(NamedTuple):
    """An update against the exact one, averaged over the last 30 steps; (1, 1, 0) is perfect."""

    rms: float
    largest: float
    nrmse: float


def compare(make: Callable[[Tensor], torch.optim.Optimizer], scenario: Scenario) -> Comparison:
    """The updates of ``make(parameter)`` against torch.optim.AdamW's on the same gradients, both without decay.

    Weights are set to zero before each step that is looked at, so that a weight after it is minus the update.
    """
    own, exact = (torch.nn.Parameter(torch.zeros(ELEMENTS)) for _ in range(2))
    optimizer = make(own)
    oracle = torch.optim.AdamW([exact], lr=1.0, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0)
    rows = []
    for step, grad in enumerate(gradients(scenario), 1):
        own.grad, exact.grad = grad, grad
        if step > scenario.steps - 30:
            for param in (own, exact):
                param.data.zero_()
        optimizer.step()
        oracle.step()
        if step > scenario.steps - 30:
            u, v = own.detach().double(), exact.detach().double()
            rows.append([u.norm() / v.norm(), u.abs().max() / v.abs().max(), (u - v).norm() / v.norm()])
    return Comparison(*torch.tensor(rows).mean(0).tolist())


class Drift(NamedTuple):
    """How a long average is off; a format is unbiased in the value, (1, …), or in the squared update, (…, 1)."""

    value: float  # mean of stored over exact second moment
    squared_update: float  # mean of exact over stored second moment


def drift(make: Callable[[Tensor], torch.optim.Optimizer], spread: float, steps: int = 4000) -> Drift:
    """The second moment after many steps of gradients whose sizes are spread log-normally."""
    param = torch.nn.Parameter(torch.zeros(ELEMENTS))
    optimizer = make(param)
    gen = torch.Generator().manual_seed(1)
    size = torch.exp(spread * torch.randn(ELEMENTS, generator=gen))
    exact = torch.zeros(ELEMENTS, dtype=torch.float64)
    for _ in range(steps):
        grad = 1e-6 * size * torch.randn(ELEMENTS, generator=gen)
        param.grad = grad
        optimizer.step()
        exact = BETA2 * exact + (1 - BETA2) * grad.double() ** 2
    stored = optimizer.dequantized_state(param)["exp_avg_sq"].double()  # type: ignore[attr-defined]
    return Drift((stored / exact).mean().item(), (exact / stored).mean().item())
