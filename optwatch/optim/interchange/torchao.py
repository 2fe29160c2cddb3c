"""torchao's layout: torch's keys, each slot of at least 4096 elements a tensor subclass with codes and scales.

Its 8-bit codes are those of our ``int8_dynamic``, its fp8 ones those of our ``fp8``, bit by bit. Its 4-bit codes, two a
byte with the even element in the upper half, are decoded. Blocks lie in row-major order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optwatch.codecs import Codec
from optwatch.codecs.fp8.codec import FORMAT as FP8
from optwatch.codecs.int8_dynamic.codec import FORMAT as INT8_DYNAMIC
from optwatch.codecs.int8_dynamic.codec import dynamic_map
from optwatch.rules import Rule, Slot

NAME = "torchao"


def wrote(state_dict: Mapping[str, Any]) -> bool:
    """By the parts of its tensors; a checkpoint without one is the same as torch's."""
    return any(map(_quantised, (value for state in state_dict["state"].values() for value in state.values())))


def _quantised(value: object) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "codes") and hasattr(value, "scale")


def options(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The names are torch's; the rate is always a tensor there."""
    taken = {name: value for name, value in saved.items() if name in own and name != "params"}
    return taken | {"lr": float(saved["lr"])}


def read(saved: Mapping[str, Any], rule: Rule, param: Tensor) -> dict[str, Any]:
    """See :class:`optwatch.optim.interchange.Peer`."""
    state = dict(saved)
    for slot in rule.slots:
        if _quantised(state.get(slot.name)):
            state |= _read(slot, state[slot.name], param)
    return state


def _read(slot: Slot, found: Any, param: Tensor) -> dict[str, Tensor]:
    """One slot by our keys: codes as they are where they are ours, else values."""
    ours: Codec | None
    codes, scale, table = found.codes, found.scale, getattr(found, "qmap", None)
    if tuple(found.shape) != tuple(param.shape):
        raise ValueError(f"{slot.name!r} has shape {tuple(found.shape)}, the parameter {tuple(param.shape)}")
    block, rest = divmod(param.numel(), max(len(scale), 1))
    if rest:
        raise ValueError(
            f"{slot.name!r} has {len(scale)} scales, expected a divisor of {param.numel()} elements"
        )
    if table is None:
        ours, buffer = FP8[slot.kind], "scale"
        values = codes.float().view(-1)
    elif codes.numel() == param.numel():
        ours, buffer = INT8_DYNAMIC[slot.kind], "absmax"
        if not torch.equal(table.cpu(), dynamic_map(slot.kind)):
            ours = None
        values = table[codes.view(-1).int()]
    else:
        ours, buffer = None, ""
        values = table[torch.stack([codes >> 4, codes & 15], 1).view(-1).int()]
    if ours is not None and block == ours.block:
        return {slot.name: codes.view(param.shape), f"{slot.name}_{buffer}": scale}
    return {slot.name: (values.view(len(scale), -1) * scale[:, None]).view(param.shape)}
