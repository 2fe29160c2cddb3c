"""Storage formats of optimizer state: one folder each, found by name.

A format maps each :class:`Kind` of slot to the :class:`Codec` that keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from optwatch.codecs.base import Buffer, Codec, Kind
from optwatch.codecs.bf16.codec import FORMAT as BF16
from optwatch.codecs.fp32.codec import FORMAT as FP32
from optwatch.codecs.int8.codec import FORMAT as INT8

__all__ = ["FORMATS", "SMALL_TENSOR", "Buffer", "Codec", "Kind", "codec_for", "find_codec", "state_format"]

#: The storage formats by the name that ``state=`` takes.
FORMATS: dict[str, dict[Kind, Codec]] = {"fp32": FP32, "bf16": BF16, "int8": INT8}

#: Tensors with fewer elements keep fp32 state in the formats below: their bytes do not matter, their accuracy does.
SMALL_TENSOR = 4096
_EXACT_WHEN_SMALL = frozenset({"int8"})


def state_format(name: str) -> dict[Kind, Codec]:
    """The storage format of this name; a ``ValueError`` names the valid ones."""
    try:
        return FORMATS[name]
    except (KeyError, TypeError):
        raise ValueError(
            f"unknown state format {name!r}: use one of {', '.join(map(repr, FORMATS))}"
        ) from None


def codec_for(name: str, kind: Kind, numel: int) -> Codec:
    """The codec that format ``name`` gives to a slot of ``kind`` for a tensor of ``numel`` elements."""
    chosen = state_format(name)
    if name in _EXACT_WHEN_SMALL and numel < SMALL_TENSOR:
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
