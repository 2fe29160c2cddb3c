"""What a weight format keeps in ``optimizer.state[param]``: the correction of a split format, under its own key.

The weight's primary buffer is the parameter itself, so all there is in the state is ``weight_correction``, an integer
tensor with the parameter's shape and memory order. See :mod:`optwatch.codecs.weights.codec`.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from optwatch.codecs import CORRECTION, VALUES, WEIGHTS, Buffer, Codec, weight_codec
from optwatch.optim.layout import flat, flat_copy, memory_order, shaped

KEY = f"weight_{CORRECTION}"


def correction_of(codec: Codec) -> Buffer | None:
    """The buffer that a weight's codec keeps beside the parameter."""
    return next((buffer for buffer in codec.buffers if buffer.name == CORRECTION), None)


def begin(codec: Codec, param: Tensor) -> dict[str, Tensor]:
    """State for a weight that is exactly what the parameter holds, by key."""
    buffer = correction_of(codec)
    if buffer is None:
        return {}
    return {KEY: torch.zeros_like(param, dtype=buffer.dtype, requires_grad=False)}


def found_format(state: Mapping[str, Any], param: Tensor) -> str | None:
    """The split format that the state of ``param`` is in, None without one; a ``ValueError`` says what does not fit."""
    correction = state.get(KEY)
    if correction is None:
        return None
    if not isinstance(correction, Tensor) or correction.shape != param.shape:
        found = tuple(correction.shape) if isinstance(correction, Tensor) else type(correction).__name__
        raise ValueError(f"{KEY!r} should be a tensor of shape {tuple(param.shape)}, found {found}")
    for name, codec in WEIGHTS.items():
        buffer = correction_of(codec)
        if buffer is not None and buffer.dtype == correction.dtype:
            return name
    raise ValueError(f"{KEY!r} has dtype {correction.dtype}, which is that of no weight format")


def format_of(asked: str, state: Mapping[str, Any], param: Tensor) -> str:
    """The format to step ``param`` in: that of the correction found, else the one ``asked`` for if it needs none."""
    if len(weight_codec(asked, param.dtype).buffers) == 1 and KEY not in state:
        return asked if param.dtype != torch.float32 else "native"
    return (found_format(state, param) if param.dtype != torch.float32 else None) or "native"


def flat_correction(codec: Codec, param: Tensor, state: MutableMapping[str, Any]) -> Tensor | None:
    """The correction as the kernels want it: flat, in the order of ``param``, into which it is laid if it is not."""
    if correction_of(codec) is None:
        return None
    order = memory_order(param)
    if flat(state[KEY], order) is None:
        state[KEY] = shaped(flat_copy(state[KEY], order), tuple(param.shape), order)
    return flat(state[KEY], order)


def exact_weight(asked: str, state: Mapping[str, Any], param: Tensor) -> Tensor:
    """The weight with its correction, as a new fp32 tensor of the parameter's shape."""
    codec = weight_codec(format_of(asked, state, param), param.dtype)
    order = memory_order(param)
    buffers = {VALUES: flat_copy(param.detach(), order)}
    if correction_of(codec) is not None:
        buffers[CORRECTION] = flat_copy(state[KEY], order)
    return shaped(codec.load(buffers), tuple(param.shape), order).clone()


def load_correction(asked: str, saved: Mapping[str, Any], param: Tensor, convert: bool) -> dict[str, Tensor]:
    """The correction to go on with, by key; a ``ValueError`` unless it is ``saved`` as ``asked``, or to be converted.

    The parameter is not touched: a correction that lacks begins at zero, and one that nobody wants is dropped.
    """
    codec, found = weight_codec(asked, param.dtype), found_format(saved, param)
    buffer = correction_of(codec)
    if found != (asked if buffer is not None else None) and not convert:
        has = "no correction of the weight" if found is None else f"{KEY!r} of {found}"
        kept = f"weights={asked!r} for a {param.dtype} parameter keeps {'none' if buffer is None else 'one'}"
        raise ValueError(
            f"it has {has}, and {kept}: construct the optimizer with the checkpoint's format, or load with convert=True"
        )
    state = begin(codec, param)
    if buffer is not None and found is not None:
        values = saved[KEY].to(param.device, torch.int32)
        bits, had = 8 * buffer.dtype.itemsize, 8 * saved[KEY].dtype.itemsize
        if bits < had:
            values = (values + (1 << had - bits - 1) >> had - bits).clamp(max=(1 << bits - 1) - 1)
        state[KEY].copy_(values << max(bits - had, 0))
    return state
