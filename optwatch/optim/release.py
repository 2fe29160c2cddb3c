"""Stepping inside the backward pass: each parameter as its gradient arrives, which is then freed.

The memory of all gradients is never needed at once, only that of the few that are alive at a time. Each parameter takes
exactly the step that it would take in ``step()``: same state, same step count, same random numbers, so the same bits.
What needs all gradients together cannot be had: accumulation over several backward passes (each one steps), clipping by
the global norm, and a loss scaler, which looks for infinities before it lets anything step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from optwatch.optim.binding import Binding, Stale
from optwatch.optim.stats import PlanStats, StatsLayout

Bind = Callable[[Tensor], Binding]
Run = Callable[[Binding], PlanStats | None]


class Release:
    """The hooks that step parameters in the backward pass, and what the steps of one pass left.

    ``bind`` makes a plan for one parameter, ``run`` takes its step.
    """

    def __init__(self, params: Sequence[Tensor], bind: Bind, run: Run) -> None:
        self._bind, self._run = bind, run
        self._bindings: dict[int, Binding] = {}  # by the parameter's identity
        self._plans: list[PlanStats] = []
        self._handles: list[Any] = [
            param.register_post_accumulate_grad_hook(self._arrived) for param in params if param.requires_grad
        ]

    def take(self) -> tuple[tuple[StatsLayout, ...], tuple[PlanStats, ...]]:
        """Every layout, and the statistics since the last call."""
        plans, self._plans = tuple(self._plans), []
        return tuple(binding.layout for binding in self._bindings.values()), plans

    def remove(self) -> None:
        """Step in the backward pass no more."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        """Step ``param`` and free its gradient."""
        binding = self._bindings.get(id(param))
        if binding is None or not binding.is_current():
            binding = self._bindings[id(param)] = self._bind(param)
        try:
            stats = self._run(binding)
        except Stale:
            binding = self._bindings[id(param)] = self._bind(param)
            stats = self._run(binding)
        if stats is not None:
            self._plans.append(stats)
        param.grad = None
