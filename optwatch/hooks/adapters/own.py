"""Our own optimizers, read like the others: for the shadow, which compares what they store with what they should."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from optwatch.codecs import Codec
from optwatch.hooks.adapters.base import Group, Math, State, Stored
from optwatch.optim import Optimizer
from optwatch.optim.layout import memory_order
from optwatch.optim.slots import flat_buffers, identify


class Own:
    """The optimizers of ``optwatch.optim``."""

    name = "optwatch"

    def knows(self, optimizer: torch.optim.Optimizer) -> bool:
        """By its class."""
        return isinstance(optimizer, Optimizer)

    def slot_of(self, optimizer: torch.optim.Optimizer) -> Mapping[str, str]:
        """They count their bytes themselves."""
        return {}

    def slots(self, optimizer: torch.optim.Optimizer, param: Tensor, state: State) -> list[Stored]:
        """All slots of the rule."""
        own = cast(Optimizer, optimizer)
        fitting = [
            rule
            for rule in map(own.rule_for, own.param_groups)
            if all(slot.name in state for slot in rule.slots)
        ]
        rule, order = max(fitting, key=lambda rule: len(rule.slots)), memory_order(param)
        found = []
        for slot in rule.slots:
            codec = identify(rule, slot, state, param)
            buffers = flat_buffers(codec, slot.name, state, order)
            parts = tuple(
                (buffers[b.name], b.packed if b.per_block is None else codec.block // b.per_block)
                for b in codec.buffers
            )
            name = "float32" if codec.name == "fp32" else codec.name
            found.append(Stored(slot.name, slot.kind, name, parts, _decoder(codec), codec.block))
        return found

    def math(self, optimizer: torch.optim.Optimizer, group: Group) -> Math | None:
        """The rule that the group is stepped by."""
        return Math(cast(Optimizer, optimizer).rule_for(group), group)


class _decoder:  # noqa: N801 - a function with a codec
    """``codec.load`` on a list of buffers."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def __call__(self, parts: Sequence[Tensor], numel: int) -> Tensor:
        named = {buffer.name: part for buffer, part in zip(self._codec.buffers, parts, strict=True)}
        return self._codec.load(named, numel)
