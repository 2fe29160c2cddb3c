"""torchao: a tensor subclass for each slot, of codes, a scale for each block and, but for fp8, a table of values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optwatch.codecs import Kind
from optwatch.hooks.adapters.base import (
    NEUTRAL,
    Group,
    Math,
    State,
    Stored,
    flat_like,
    from_package,
    plain,
    scaled,
    short,
)
from optwatch.rules import RULES

_KINDS = {"exp_avg": Kind.SIGNED, "exp_avg_sq": Kind.SECOND_MOMENT, "max_exp_avg_sq": Kind.SECOND_MOMENT}
_FORMATS = {
    "OptimState8bit": "torchao 8-bit",
    "OptimState4bit": "torchao 4-bit",
    "OptimStateFp8": "torchao fp8",
}


class TorchAO:
    """The optimizers of ``torchao.optim``."""

    name = "torchao"

    def knows(self, optimizer: torch.optim.Optimizer) -> bool:
        """By the module of its class."""
        return from_package(optimizer, self.name)

    def slot_of(self, optimizer: torch.optim.Optimizer) -> Mapping[str, str]:
        """Every key is a slot."""
        return {}

    def slots(self, optimizer: torch.optim.Optimizer, param: Tensor, state: State) -> list[Stored]:
        """Small parameters have plain tensors. Codes are in row-major order whatever the parameter's."""
        found = []
        for key, kind in _KINDS.items():
            tensor = state.get(key)
            if type(tensor) is Tensor:
                flat = flat_like(tensor, param)
                if flat is not None:
                    found.append(Stored(key, kind, short(tensor.dtype), ((flat, 1),), plain))
            elif tensor is not None and param.is_contiguous() and type(tensor).__name__ in _FORMATS:
                found.append(_quantised(key, kind, tensor))
        return found

    def math(self, optimizer: torch.optim.Optimizer, group: Group) -> Math | None:
        """Adam, with the decay that the class has."""
        if group["amsgrad"] or not hasattr(optimizer, "is_adamw"):
            return None
        return Math(RULES["adamw" if optimizer.is_adamw else "adam"], {**NEUTRAL, **group})


def _quantised(key: str, kind: Kind, tensor: Tensor) -> Stored:
    codes, scales = tensor.codes.view(-1), tensor.scale  # type: ignore[attr-defined]
    name = _FORMATS[type(tensor).__name__]
    packed = 2 if name == "torchao 4-bit" else 1
    block = len(codes) * packed // len(scales)
    table: Tensor | None = getattr(tensor, "qmap", None)

    def decode(parts: Sequence[Tensor], _numel: int) -> Tensor:
        stored, scale = parts
        if packed == 2:  # the even element in the upper half
            stored = torch.stack([stored >> 4, stored & 15], 1).view(-1)
        values = stored.float() if table is None else table.index_select(0, stored.int())
        return scaled(values, scale.float(), block)

    return Stored(key, kind, name, ((codes, packed), (scales, block)), decode, block, table)
