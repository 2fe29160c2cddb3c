"""What exporting needs of an optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from optwatch.rules import Rule

#: Options of our parameter groups that no other library has.
OWN_OPTIONS = frozenset({"state", "weights", "seed", "schema", "params"})


class Source(Protocol):
    """The optimizer, as far as exporting is concerned."""

    param_groups: list[dict[str, Any]]

    @property
    def state(self) -> Mapping[Tensor, Mapping[str, Any]]:
        """The state of each parameter."""

    def rule_for(self, group: Mapping[str, Any]) -> Rule:
        """The rule of a group."""

    def parameter_name(self, group: Mapping[str, Any], position: int) -> str:
        """How messages name a parameter."""

    def dequantized_state(self, param: Tensor) -> dict[str, Tensor]:
        """The slots of ``param`` as new fp32 tensors of its shape."""


class Stepped(NamedTuple):
    """A parameter that has state."""

    number: int  # counted through all groups, as checkpoints do
    param: Tensor
    group: Mapping[str, Any]
    name: str
    rule: Rule


def stepped(optimizer: Source) -> Iterator[Stepped]:
    """Every parameter that has state."""
    number = 0
    for group in optimizer.param_groups:
        rule = optimizer.rule_for(group)
        for position, param in enumerate(group["params"]):
            if optimizer.state.get(param):
                yield Stepped(number, param, group, optimizer.parameter_name(group, position), rule)
            number += 1


def numbered(optimizer: Source) -> list[list[int]]:
    """The numbers of the parameters of each group."""
    groups, number = [], 0
    for group in optimizer.param_groups:
        groups.append(list(range(number, number + len(group["params"]))))
        number += len(group["params"])
    return groups
