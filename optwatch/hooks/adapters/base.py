"""What an adapter is: how to read the state of an optimizer that is not ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from optwatch.codecs import Kind
from optwatch.optim.layout import flat, memory_order
from optwatch.rules import RULES, Rule

#: Elements that share a scale in the one format with a table that the compiled library reads.
TABLE_BLOCK = 256

Group = Mapping[str, Any]
State = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Stored:
    """One slot of one parameter as it is found: flat buffers, and how to decode a run of them.

    ``buffers`` pairs each with the number of elements that one of its entries stands for: 1 for codes, 2 where two
    share a byte, the block's length for scales. ``decode`` takes a cut of each, and the number of elements, to fp32.
    A run may start at any multiple of ``block``. ``table`` holds the fp32 values that codes stand for, if decoding is
    no more than these times the scales.
    """

    name: str
    kind: Kind
    format: str  # as the optimizer's own documentation calls it
    buffers: tuple[tuple[Tensor, int], ...]
    decode: Callable[[Sequence[Tensor], int], Tensor]
    block: int = 1
    table: Tensor | None = None

    @property
    def codec(self) -> str | None:
        """What the compiled library calls the format; None if it has no name for it."""
        if self.decode is plain:
            return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(self.buffers[0][0].dtype)
        types = [array.dtype for array in self.arrays]
        known = self.block == TABLE_BLOCK and types == [torch.uint8, torch.float32, torch.float32]
        return "table8" if known and self.buffers[0][1] == 1 else None

    @property
    def arrays(self) -> list[Tensor]:
        """All that is read."""
        return [buffer for buffer, _ in self.buffers] + ([] if self.table is None else [self.table])

    @property
    def exact(self) -> bool:
        """Whether the slot is kept in fp32, so that it holds what the rule computed."""
        return self.format == "float32"

    def read(self, start: int, stop: int) -> Tensor:
        """The values of the elements ``[start, stop)``; a view where they are kept in fp32."""
        parts = [buffer[start // per : -(-stop // per)] for buffer, per in self.buffers]
        return self.decode(parts, stop - start)

    def take(self, blocks: Tensor, size: int) -> Tensor:
        """The values of whole blocks of ``size`` elements by their numbers, as fp32 ``[blocks, size]``."""
        parts = [take(buffer, blocks, size // per) for buffer, per in self.buffers]
        return self.decode(parts, len(blocks) * size).float().view(len(blocks), size)


def take(flat: Tensor, blocks: Tensor, size: int) -> Tensor:
    """The entries of whole blocks of ``size`` entries, flat."""
    whole = len(flat) // size * size
    return flat[:whole].view(-1, size).index_select(0, blocks).view(-1)


def plain(parts: Sequence[Tensor], _numel: int) -> Tensor:
    """Decode values that are stored as what they are."""
    return parts[0]


def scaled(codes: Tensor, scales: Tensor, block: int) -> Tensor:
    """Each code times the scale of its block; the last block may be a part of one."""
    if len(codes) == len(scales) * block:
        return (codes.view(-1, block) * scales[:, None]).view(-1)
    return codes * scales.repeat_interleave(block)[: len(codes)]


def short(dtype: torch.dtype) -> str:
    """The dtype's name without the module."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Math:
    """The rule that a parameter group is stepped by, and the options that it reads, by the rule's names."""

    rule: Rule
    options: Mapping[str, Any]


class Adapter(Protocol):
    """Reads the state of the optimizers of one package. Nothing in it changes them, waits, or imports the package."""

    name: str

    def knows(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether ``optimizer`` is of this package."""

    def slot_of(self, optimizer: torch.optim.Optimizer) -> Mapping[str, str]:
        """The slot that each key of a parameter's state belongs to, where that is not the key itself."""

    def slots(self, optimizer: torch.optim.Optimizer, param: Tensor, state: State) -> list[Stored]:
        """The slots that have one value for each element of ``param``, in the order of its memory."""

    def math(self, optimizer: torch.optim.Optimizer, group: Group) -> Math | None:
        """The rule of a group, or None if it is none of ours or not elementwise."""


def from_package(optimizer: torch.optim.Optimizer, package: str) -> bool:
    """Whether the class of ``optimizer`` or one that it is derived from comes from ``package``."""
    return any(
        kind is not torch.optim.Optimizer and f"{kind.__module__}.".startswith(f"{package}.")
        for kind in type(optimizer).__mro__
    )


#: Names of slots that mean the same in every package that uses them.
NAMES: Mapping[str, Kind] = {
    **dict.fromkeys(
        ("exp_avg", "exp_avg_slow", "exp_avg_diff", "grad_avg", "momentum", "momentum_buffer", "moments", "neg_exp_avg",
         "pos_momentum", "neg_momentum", "mov_avg_grad", "grok_exp_avg", "last_grad", "previous_grad"),
        Kind.SIGNED,
    ),
    **dict.fromkeys(
        ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_avg_var", "fim"), Kind.SECOND_MOMENT
    ),
}  # fmt: skip

#: The hyperparameters that rules read, as torch.optim names them, where a group has none of them.
NEUTRAL: Mapping[str, Any] = {"weight_decay": 0.0, "maximize": False}


class Named:
    """An adapter for optimizers whose slots are plain tensors of the parameter's shape, told by their names.

    ``maths`` maps the name of a class to what gives the rule of one of its groups; a subclass is another optimizer.
    """

    def __init__(
        self, name: str, maths: Mapping[str, Callable[[Group], str | None]], names: Mapping[str, Kind] = NAMES
    ) -> None:
        self.name, self._maths, self._names = name, maths, names

    def knows(self, optimizer: torch.optim.Optimizer) -> bool:
        """By the module of its class."""
        return from_package(optimizer, self.name)

    def slot_of(self, optimizer: torch.optim.Optimizer) -> Mapping[str, str]:
        """Every key is a slot."""
        return {}

    def slots(self, optimizer: torch.optim.Optimizer, param: Tensor, state: State) -> list[Stored]:
        """The tensors with a known name and the parameter's shape."""
        found = []
        for key, tensor in state.items():
            kind = self._names.get(key)
            if kind is None or type(tensor) is not Tensor or tensor.shape != param.shape:
                continue
            flat = flat_like(tensor, param)
            if flat is not None and tensor.is_floating_point():
                found.append(Stored(key, kind, short(tensor.dtype), ((flat, 1),), plain))
        return sorted(found, key=lambda slot: slot.kind is Kind.SECOND_MOMENT)

    def math(self, optimizer: torch.optim.Optimizer, group: Group) -> Math | None:
        """By the name of the class."""
        of_group = self._maths.get(type(optimizer).__name__)
        name = (
            of_group(group)
            if of_group is not None and type(optimizer).__module__.startswith(self.name)
            else None
        )
        return None if name is None else Math(RULES[name], {**NEUTRAL, **group})


def flat_like(tensor: Tensor, param: Tensor) -> Tensor | None:
    """``tensor`` as a flat view in the order in which ``param`` lies in memory; None where that takes a copy."""
    if tensor.is_contiguous() and param.is_contiguous():
        return tensor.detach().view(-1)
    order = memory_order(param)
    return None if order is None else flat(tensor.detach(), order)
