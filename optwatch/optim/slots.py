"""How a slot lies in ``optimizer.state[param]``: which keys it has, which codec they belong to, whether they fit.

The primary buffer has the slot's own name and the parameter's shape, the others the slot's name with theirs appended:
``exp_avg`` and ``exp_avg_scale``. All are plain tensors, so a checkpoint loads with ``weights_only=True``.

Packed codes have no element of their own for each of the parameter's, so they are kept flat, in the order in which the
parameter lies in memory. Where that is not row-major, they stretch along the dimension that is innermost in memory,
all others being 1, so that a checkpoint of a ``channels_last`` model is not taken for one in row-major order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optwatch.codecs import FORMATS, Buffer, Codec, find_codec
from optwatch.optim.layout import flat_copy, memory_order, shaped
from optwatch.rules import Rule, Slot


def buffer_key(codec: Codec, slot: str, buffer: Buffer) -> str:
    """The key of one buffer of a slot in a parameter's state."""
    return slot if buffer is codec.buffers[0] else f"{slot}_{buffer.name}"


def shaped_like_parameter(buffer: Buffer) -> bool:
    """Whether a buffer has one value for each element of the parameter."""
    return buffer.per_block is None and buffer.packed == 1


def primary_shape(codec: Codec, param: Tensor) -> tuple[int, ...]:
    """The shape of a slot's primary buffer."""
    primary, order = codec.buffers[0], memory_order(param)
    if shaped_like_parameter(primary):
        return tuple(param.shape)
    length = codec.length(primary, param.numel())
    if order is None or list(order) == sorted(order):
        return (length,)
    return tuple(length if dim == order[-1] else 1 for dim in range(param.dim()))


def flat_buffers(
    codec: Codec, slot: str, state: Mapping[str, Tensor], order: tuple[int, ...] | None
) -> dict[str, Tensor]:
    """The buffers of a slot, flat, for a parameter whose memory lies in ``order``; views where possible."""
    return {
        buffer.name: flat_copy(
            state[buffer_key(codec, slot, buffer)], order if shaped_like_parameter(buffer) else None
        )
        for buffer in codec.buffers
    }


def allocate(codec: Codec, slot: str, param: Tensor) -> dict[str, Tensor]:
    """State of zeros for one slot of ``param``, by key."""
    order = memory_order(param)
    buffers = codec.allocate(param.numel(), param.device)
    primary = codec.buffers[0]
    buffers[primary.name] = (
        shaped(buffers[primary.name], tuple(param.shape), order)
        if shaped_like_parameter(primary)
        else buffers[primary.name].view(primary_shape(codec, param))
    )
    return {buffer_key(codec, slot, buffer): buffers[buffer.name] for buffer in codec.buffers}


def begin(codec: Codec, slot: str, param: Tensor, value: float) -> dict[str, Tensor]:
    """State for one slot of ``param`` that starts at ``value`` everywhere, by key."""
    if not value or not param.numel():
        return allocate(codec, slot, param)
    values = torch.full_like(param, value, dtype=torch.float32, requires_grad=False)
    return keep(codec, slot, param, values, _even_chance(codec, param))


def lay_out(codec: Codec, slot: str, param: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same slot stored anew in the memory order that ``param`` has now, by key."""
    return keep(codec, slot, param, decode(codec, slot, param, state), _even_chance(codec, param))


def _even_chance(codec: Codec, param: Tensor) -> Tensor | None:
    """Random numbers that make a stochastic codec round to nearest."""
    return torch.full((param.numel(),), 32768.0, device=param.device) if codec.stochastic else None


def keep(
    codec: Codec, slot: str, param: Tensor, values: Tensor, random: Tensor | None = None
) -> dict[str, Tensor]:
    """State for one slot of ``param`` that holds ``values``, fp32 of the parameter's shape, by key."""
    state = allocate(codec, slot, param)
    order = memory_order(param)
    codec.store(flat_copy(values.float(), order), flat_buffers(codec, slot, state, order), random)
    return state


def decode(codec: Codec, slot: str, param: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The values of one slot of ``param`` as a new fp32 tensor of the parameter's shape.

    Blocks follow the memory of the state, which is another than the parameter's after a change of memory format.
    """
    order = memory_order(state[slot] if shaped_like_parameter(codec.buffers[0]) else param)
    values = codec.load(flat_buffers(codec, slot, state, order), param.numel())
    return shaped(values, tuple(param.shape), order).clone()


def identify(rule: Rule, slot: Slot, state: Mapping[str, Any], param: Tensor) -> Codec:
    """The codec that the tensors found for ``slot`` belong to; a ``ValueError`` says what does not fit."""
    primary = state.get(slot.name)
    if not isinstance(primary, Tensor):
        found = "nothing" if primary is None else type(primary).__name__
        raise ValueError(  # noqa: TRY004 - what a checkpoint holds, not an argument of the wrong type
            f"slot {slot.name!r} should be a tensor of shape {tuple(param.shape)}, found {found}"
        )
    others = {key.removeprefix(f"{slot.name}_") for key in _auxiliary(rule, slot) if key in state}
    codec = find_codec(slot.kind, primary.dtype, others)
    if codec is None:  # auxiliary buffers of an earlier format may have been left behind
        codec = find_codec(slot.kind, primary.dtype, ())
    if codec is None:
        raise ValueError(
            f"slot {slot.name!r} has dtype {primary.dtype} with {sorted(others) or 'no'} auxiliary buffers, which is "
            f"none of the known formats ({', '.join(FORMATS)})"
        )
    shape = primary_shape(codec, param)
    if tuple(primary.shape) != shape:
        wanted = "" if shape == tuple(param.shape) else f", of which {codec.name} makes {shape}"
        raise ValueError(
            f"slot {slot.name!r} has shape {tuple(primary.shape)}, the parameter {tuple(param.shape)}{wanted}"
        )
    for buffer in codec.buffers[1:]:
        _check_vector(
            state, buffer_key(codec, slot.name, buffer), buffer, codec.length(buffer, param.numel())
        )
    return codec


def _check_vector(state: Mapping[str, Any], key: str, buffer: Buffer, length: int) -> None:
    """Raise a ``ValueError`` unless an auxiliary buffer is what its codec makes."""
    found = state.get(key)
    if not isinstance(found, Tensor):
        raise ValueError(  # noqa: TRY004 - see identify()
            f"{key!r} should be a tensor of {length} values, found {type(found).__name__}"
        )
    if found.numel() != length or found.dim() != 1:
        raise ValueError(f"{key!r} has {_extent(found)}, expected {length}")
    if found.dtype != buffer.dtype:
        raise ValueError(f"{key!r} has dtype {found.dtype}, expected {buffer.dtype}")


def _extent(tensor: Tensor) -> str:
    return f"{len(tensor)} values" if tensor.dim() == 1 else f"shape {tuple(tensor.shape)}"


def _auxiliary(rule: Rule, slot: Slot) -> set[str]:
    """Every key that an auxiliary buffer of ``slot`` can have and that is not another slot's."""
    keys = {
        buffer_key(chosen[slot.kind], slot.name, buffer)
        for chosen in FORMATS.values()
        for buffer in chosen[slot.kind].buffers[1:]
    }
    return keys - {other.name for other in rule.slots}
