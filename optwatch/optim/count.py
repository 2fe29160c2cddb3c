"""Bytes of optimizer state, counted: the sum of the storages that ``optimizer.state`` reaches, each once."""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from optwatch.optim.sharded import is_sharded, local

#: Values that hold no tensor; most of what is no tensor is one of them.
PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device, torch.Size)
#: Whatever is of these types is shared with others or has more in it than state.
_CLOSED = (type, types.ModuleType, torch.nn.Module, torch.optim.Optimizer)


class StateKind(NamedTuple):
    """What state bytes are counted by."""

    slot: str
    dtype: str
    device: str


class Leaf(NamedTuple):
    """A tensor found in the state, under which key."""

    key: str
    tensor: Tensor


def state_leaves(state: Mapping[Any, Any]) -> list[Leaf]:
    """Every plain tensor that ``optimizer.state`` reaches: in lists, dicts and objects, inside tensor subclasses.

    The key is the one in the parameter's own dict, or, of state that belongs to no parameter, the one in ``state``.
    """
    leaves: list[Leaf] = []
    for owner, value in state.items():
        if isinstance(value, dict):
            for key, held in value.items():
                if type(held) is Tensor:  # nearly always
                    leaves.append(Leaf(key, held))
                elif not isinstance(held, PLAIN):
                    leaves += (Leaf(str(key), tensor) for tensor in _tensors(held, set()))
        elif not isinstance(value, PLAIN):
            leaves += (Leaf(str(owner), tensor) for tensor in _tensors(value, set()))
    return leaves


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """The plain tensors in ``value``; a wrapper is taken apart, since only what it wraps has memory."""
    if isinstance(value, PLAIN) or id(value) in seen:
        return
    seen.add(id(value))
    if is_sharded(value):  # its mesh, which it lists among its parts, is no state
        yield from _tensors(local(cast("Tensor", value)), seen)
        return
    if isinstance(value, Tensor):
        names: list[str] = value.__tensor_flatten__()[0] if _wraps(value) else []  # type: ignore[attr-defined]
        for name in names:
            yield from _tensors(getattr(value, name), seen)
        if not names:
            yield value
        return
    inside: Iterable[object] = ()
    if isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, Iterable) and not isinstance(value, Iterator):
        inside = value
    elif not isinstance(value, _CLOSED) and not callable(value):
        inside = getattr(value, "__dict__", {}).values()
    for one in inside:
        yield from _tensors(one, seen)


def _wraps(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a subclass that only holds others."""
    return is_traceable_wrapper_subclass(tensor)


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """The addresses of the storages behind ``tensors``."""
    return {
        leaf.untyped_storage().data_ptr()
        for tensor in tensors
        for leaf in _tensors(tensor, set())
        if leaf.layout == torch.strided
    }


def count_bytes(
    leaves: Iterable[Leaf],
    slots: Mapping[str, str] | tuple[str, ...] = (),
    apart: AbstractSet[int] = frozenset(),
) -> dict[StateKind, int]:
    """The bytes of the storages behind ``leaves``, each counted once, under the slot it is found in first.

    ``slots`` maps keys to the slot that they belong to, or names slots whose keys begin with theirs (``exp_avg`` has
    ``exp_avg_scale``); any other key is its own slot. Storages at the addresses ``apart``, such as those of the
    parameters, are left out.
    """
    counted: dict[StateKind, int] = defaultdict(int)
    seen = set(apart)
    for key, tensor in leaves:
        for dense in _dense(tensor):
            storage = dense.untyped_storage()
            address = storage.data_ptr()  # 0 where it is empty or on the meta device
            if address and address in seen:
                continue
            seen.add(address)
            dtype = str(dense.dtype).removeprefix("torch.")
            counted[StateKind(_slot(key, slots), dtype, str(dense.device))] += storage.nbytes()
    return dict(counted)


def _dense(tensor: Tensor) -> tuple[Tensor, ...]:
    """What holds the memory of ``tensor``: of a sparse one its indices and values."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()  # noqa: SLF001 - the public ones refuse uncoalesced ones
    return (tensor,)


def _slot(key: str, slots: Mapping[str, str] | tuple[str, ...]) -> str:
    if isinstance(slots, Mapping):
        return slots.get(key, key)
    return max((s for s in slots if key == s or key.startswith(f"{s}_")), key=len, default=key)
