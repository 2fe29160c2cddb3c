"""bitsandbytes: ``state1`` and ``state2``, in fp32 or as codes of a table with a scale for each block of 256.

Its Adam has the decoupled decay of AdamW. Its Adam with ``max_unorm`` (LAMB, LARS) scales the update by norms of the
whole tensor, so it has no elementwise rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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

_SIGNED, _SQUARE = Kind.SIGNED, Kind.SECOND_MOMENT
#: What the optimizer calls itself -> its slots by torch's names.
_SLOTS: Mapping[str, tuple[tuple[str, Kind], ...]] = {
    "adam": (("exp_avg", _SIGNED), ("exp_avg_sq", _SQUARE)),
    "lamb": (("exp_avg", _SIGNED), ("exp_avg_sq", _SQUARE)),
    "lion": (("exp_avg", _SIGNED),),
    "momentum": (("momentum_buffer", _SIGNED),),
    "lars": (("momentum_buffer", _SIGNED),),
    "rmsprop": (("square_avg", _SQUARE),),
    "adagrad": (("sum", _SQUARE),),
    "ademamix": (("exp_avgs", _SIGNED), ("exp_avg_sq", _SQUARE)),
}


class BitsAndBytes:
    """The optimizers of ``bitsandbytes.optim``."""

    name = "bitsandbytes"

    def knows(self, optimizer: torch.optim.Optimizer) -> bool:
        """By the module of its class."""
        return from_package(optimizer, self.name)

    def slot_of(self, optimizer: torch.optim.Optimizer) -> Mapping[str, str]:
        """``state1`` with its scales and table is the first slot, ``state2`` the second."""
        names = _SLOTS.get(getattr(optimizer, "optimizer_name", ""), ())
        return {
            f"{part}{number}": name
            for number, (name, _) in enumerate(names, start=1)
            for part in ("state", "absmax", "qmap")
        }

    def slots(self, optimizer: torch.optim.Optimizer, param: Tensor, state: State) -> list[Stored]:
        """Those with the parameter's shape; the two moments that AdEMAMix keeps in one tensor have another."""
        found = []
        for number, (name, kind) in enumerate(
            _SLOTS.get(getattr(optimizer, "optimizer_name", ""), ()), start=1
        ):
            tensor = state.get(f"state{number}")
            flat = None if tensor is None or tensor.shape != param.shape else flat_like(tensor, param)
            if flat is None:
                continue
            if flat.dtype == torch.uint8:
                found.append(_quantised(name, kind, flat, state[f"absmax{number}"], state[f"qmap{number}"]))
            else:
                found.append(Stored(name, kind, short(flat.dtype), ((flat, 1),), plain))
        return found

    def math(self, optimizer: torch.optim.Optimizer, group: Group) -> Math | None:
        """By its own name for itself; betas are what it stores all coefficients in."""
        arguments = getattr(optimizer, "args", None)
        if getattr(arguments, "max_unorm", 0.0) or getattr(arguments, "skip_zeros", False):
            return None
        name, beta = getattr(optimizer, "optimizer_name", ""), group["betas"][0]
        more: dict[str, Any] = {
            "adam": {"rule": "adamw"},
            "lion": {"rule": "lion"},
            "momentum": {"rule": "sgd_momentum", "momentum": beta, "dampening": 0.0, "nesterov": False},
            "rmsprop": {"rule": "rmsprop", "alpha": beta, "momentum": 0.0},
            "adagrad": {"rule": "adagrad", "lr_decay": 0.0},
        }.get(name, {})
        return Math(RULES[more.pop("rule")], {**NEUTRAL, **group, **more}) if more else None


def _quantised(name: str, kind: Kind, codes: Tensor, scales: Tensor, table: Tensor) -> Stored:
    block = 256

    def decode(parts: Sequence[Tensor], _numel: int) -> Tensor:
        stored, scale = parts
        return scaled(table.index_select(0, stored.int()), scale, block)

    return Stored(name, kind, "bitsandbytes 8-bit", ((codes, 1), (scales, block)), decode, block, table)
