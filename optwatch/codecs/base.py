"""What a storage format is: how one slot of optimizer state is kept between two steps.

The classes here are the reference: eager torch on any device, readable in a minute. Kernels agree with them.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


class Kind(enum.Enum):
    """What values a slot can take; a storage format has one codec for each kind."""

    SIGNED = "signed"
    SECOND_MOMENT = "second moment"  # never negative; enters the update through its square root


@dataclass(frozen=True)
class Buffer:
    """One tensor that a codec keeps for a slot.

    ``per_block`` is the number of values for each block of the codec; ``None`` stands for one value per element.
    """

    name: str
    dtype: torch.dtype
    per_block: int | None = None


class Codec(abc.ABC):
    """One way to keep a slot: ``load`` to fp32, ``store``, and the exact number of bytes.

    A codec works on a flat run of elements that starts at a block's first element, so a caller may cut a tensor
    anywhere at a multiple of ``block``. ``buffers[0]`` is the primary buffer, one value per element.
    """

    name: str  # unique among all codecs
    block: int = 1  # elements that share the values of the other buffers
    stochastic: bool = False  # store() needs random numbers
    buffers: tuple[Buffer, ...]

    def length(self, buffer: Buffer, numel: int) -> int:
        """The number of values ``buffer`` holds for ``numel`` elements; the last block may be partial."""
        return numel if buffer.per_block is None else -(-numel // self.block) * buffer.per_block

    def nbytes(self, numel: int) -> int:
        """The exact bytes of all buffers for ``numel`` elements."""
        return sum(self.length(b, numel) * b.dtype.itemsize for b in self.buffers)

    def allocate(self, numel: int, device: torch.device) -> dict[str, Tensor]:
        """Buffers that decode to zero everywhere."""
        return {
            b.name: torch.zeros(self.length(b, numel), dtype=b.dtype, device=device) for b in self.buffers
        }

    def cut(self, buffers: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """Views of flat ``buffers`` for the elements ``[start, stop)``; ``start`` is a multiple of ``block``."""
        first = start // self.block
        return {
            b.name: buffers[b.name][start:stop]
            if b.per_block is None
            else buffers[b.name][first * b.per_block : first * b.per_block + self.length(b, stop - start)]
            for b in self.buffers
        }

    @abc.abstractmethod
    def load(self, buffers: Mapping[str, Tensor]) -> Tensor:
        """The stored values, flat fp32."""

    @abc.abstractmethod
    def store(self, values: Tensor, buffers: Mapping[str, Tensor], random: Tensor | None = None) -> Tensor:
        """Write flat fp32 ``values`` into ``buffers`` and return what :meth:`load` will give.

        ``random`` holds an independent uniform integer of [0, 65536) for each element, as fp32; codecs with
        ``stochastic`` set need it.
        """

    def saturated(self, values: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        """Which finite ``values`` exceed the largest magnitude that the block, as stored, can hold."""
        return torch.zeros_like(values, dtype=torch.bool)

    def __repr__(self) -> str:
        """The codec's name."""
        return self.name


def blocks(values: Tensor, block: int) -> Tensor:
    """A flat tensor as ``[number of blocks, block]``, the last block filled up with zeros."""
    missing = -len(values) % block
    return torch.nn.functional.pad(values, (0, missing)).view(-1, block)
