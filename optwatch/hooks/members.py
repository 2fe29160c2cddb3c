"""An optimizer's parameters with their gradients and state, as plain tensors of this rank."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optwatch.hooks.adapters import Math, Stored
from optwatch.optim import Optimizer
from optwatch.optim.layout import flat_copy, memory_order
from optwatch.optim.sharded import is_sharded, local, local_state

#: A parameter, its state, and the number of its group.
Parameter = tuple[Tensor, Mapping[str, Any], int]

_GRAD = operator.attrgetter("grad")


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter that has a gradient, as local plain tensors."""

    index: int  # counted through all groups
    param: Tensor
    grad: Tensor  # flat
    state: Mapping[str, Any]
    group: int


@dataclass(frozen=True, eq=False)
class Stepped:
    """A parameter after its step: gradient, weight and slots as that left them, and the rule that it took."""

    member: Member
    slots: list[Stored]  # in the order of the rows
    math: Math | None  # whose slots are among them; None where the update does not follow from it
    step: float  # its number, from 1

    @property
    def order(self) -> tuple[int, ...]:
        """The places of the rule's slots among ours."""
        names = [slot.name for slot in self.slots]
        return () if self.math is None else tuple(names.index(slot.name) for slot in self.math.rule.slots)


def parameters(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    """Each parameter, its state as plain local tensors, and the number of its group, through all groups."""
    return [
        (param, _plain(optimizer, param), number)
        for number, group in enumerate(optimizer.param_groups)
        for param in group["params"]
    ]


def members(optimizer: torch.optim.Optimizer) -> list[Member]:
    """The parameters that have a gradient."""
    return [
        Member(index, _piece(param), flat_gradient(param), state, group)
        for index, (param, state, group) in enumerate(parameters(optimizer))
        if param.grad is not None and param.numel()
    ]


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor | None]:
    """The local piece of the gradient of each parameter, through all groups, in whatever order it lies in memory."""
    grads = map(_GRAD, [param for group in optimizer.param_groups for param in group["params"]])
    return [grad if grad is None or type(grad) is Tensor else local(grad) for grad in grads]


def flat_gradient(param: Tensor) -> Tensor:
    """The gradient of ``param``, its local piece, flat in the order of the parameter; of a sparse one the values."""
    assert param.grad is not None
    grad, own = _piece(param.grad), _piece(param)
    if grad.layout != torch.strided:
        return grad.coalesce().values().reshape(-1)
    if grad.is_contiguous() and own.is_contiguous():
        return grad.view(-1)
    return flat_copy(grad, memory_order(own))


def _piece(tensor: Tensor) -> Tensor:
    """:func:`local` without its cost for the many that are no DTensor."""
    return local(tensor) if is_sharded(tensor) else tensor


def _plain(optimizer: torch.optim.Optimizer, param: Tensor) -> Mapping[str, Any]:
    state: dict[str, Any] = optimizer.state.get(param, {})
    if not is_sharded(param):
        return state
    if isinstance(optimizer, Optimizer):
        return local_state(param, state)
    return {key: local(value) if isinstance(value, Tensor) else value for key, value in state.items()}
