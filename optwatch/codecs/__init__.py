"""Storage formats of optimizer state: one folder each, found by name.

A format maps each :class:`Kind` of slot to the :class:`Codec` that keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch

from optwatch.codecs.base import Buffer, Codec, Kind
from optwatch.codecs.bf16.codec import FORMAT as BF16
from optwatch.codecs.fp8.codec import FORMAT as FP8
from optwatch.codecs.fp32.codec import FORMAT as FP32
from optwatch.codecs.int4.codec import FORMAT as INT4
from optwatch.codecs.int8.codec import FORMAT as INT8
from optwatch.codecs.int8_dynamic.codec import FORMAT as INT8_DYNAMIC
from optwatch.codecs.weights.codec import CORRECTION, EXACT, VALUES, WEIGHTS

__all__ = [
    "CORRECTION",
    "FORMATS",
    "SMALL_TENSOR",
    "VALUES",
    "WEIGHTS",
    "Buffer",
    "Codec",
    "Kind",
    "SlotFormats",
    "StateFormat",
    "check_state",
    "codec_for",
    "find_codec",
    "state_format",
    "weight_codec",
]

#: The storage formats by the name that ``state=`` takes.
FORMATS: dict[str, dict[Kind, Codec]] = {
    "fp32": FP32,
    "bf16": BF16,
    "int8": INT8,
    "int8_dynamic": INT8_DYNAMIC,
    "fp8": FP8,
    "int4": INT4,
}

#: How a parameter is kept: in one format, or in one for each slot by its name, with ``"default"`` for the others.
SlotFormats: TypeAlias = str | Mapping[str, str]
#: What ``state=`` takes: that, or a rule on parameters' names: patterns as further keys, or a function of the name.
StateFormat: TypeAlias = SlotFormats | Mapping[str, SlotFormats] | Callable[[str], SlotFormats]
DEFAULT = "default"

#: Tensors with fewer elements keep fp32 state in low-bit formats: their bytes do not matter, their accuracy does.
SMALL_TENSOR = 4096
_EXACT_AT_ANY_SIZE = frozenset({"fp32", "bf16"})


def state_format(name: str) -> dict[Kind, Codec]:
    """The storage format of this name; a ``ValueError`` names the valid ones."""
    try:
        return FORMATS[name]
    except (KeyError, TypeError):
        raise ValueError(
            f"unknown state format {name!r}: use one of {', '.join(map(repr, FORMATS))}"
        ) from None


def check_state(state: SlotFormats, slots: Sequence[str]) -> None:
    """Raise a ``ValueError`` unless ``state`` gives each of these slots a known format, and no other slot one."""
    if not isinstance(state, Mapping):
        state_format(state)
        return
    valid = ", ".join(map(repr, [*slots, DEFAULT]))
    for name, chosen in state.items():
        if name not in (*slots, DEFAULT):
            raise ValueError(f"state= names a slot {name!r} that this optimizer does not keep: use {valid}")
        state_format(chosen)
    missing = [slot for slot in slots if slot not in state]
    if missing and DEFAULT not in state:
        raise ValueError(
            f"state= has no format for {', '.join(map(repr, missing))}: name one, or one for {DEFAULT!r}"
        )


def codec_for(state: SlotFormats, slot: str, kind: Kind, numel: int) -> Codec:
    """The codec that ``state`` gives to the slot of this name and kind for a tensor of ``numel`` elements."""
    name = (state[slot] if slot in state else state[DEFAULT]) if isinstance(state, Mapping) else state
    chosen = state_format(name)
    if numel < SMALL_TENSOR and name not in _EXACT_AT_ANY_SIZE:
        chosen = FORMATS["fp32"]
    return chosen[kind]


def find_codec(kind: Kind, primary: torch.dtype, others: Iterable[str]) -> Codec | None:
    """The codec whose primary buffer has this dtype and whose other buffers have these names, if there is one."""
    others = set(others)
    for chosen in FORMATS.values():
        codec = chosen[kind]
        if codec.buffers[0].dtype == primary and {b.name for b in codec.buffers[1:]} == others:
            return codec
    return None


def weight_codec(weights: str, dtype: torch.dtype) -> Codec:
    """The codec that ``weights=`` means for parameters of this dtype; a ``ValueError`` names the valid ones.

    An fp32 parameter needs no help: it is kept as it is in every format.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"unknown weight format {weights!r}: use one of {', '.join(map(repr, WEIGHTS))}")
    return EXACT if dtype == EXACT.buffers[0].dtype else WEIGHTS[weights]
