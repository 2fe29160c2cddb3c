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

    ``per_block`` is the number of values for each block of the codec; ``None`` stands for one value per element, or,
    with ``packed``, for that many neighbouring elements: two 4-bit codes a byte, the even element in the lower half.
    """

    name: str
    dtype: torch.dtype
    per_block: int | None = None
    packed: int = 1


class Codec(abc.ABC):
    """One way to keep a slot: ``load`` to fp32, ``store``, and the exact number of bytes.

    A codec works on a flat run of elements that starts at a block's first element, so a caller may cut a tensor
    anywhere at a multiple of ``block``. ``buffers[0]`` is the primary buffer: the codes, one for each element.
    """

    name: str  # unique among all codecs
    block: int = 1  # elements that share the values of the other buffers
    stochastic: bool = False  # store() needs random numbers
    buffers: tuple[Buffer, ...]

    def length(self, buffer: Buffer, numel: int) -> int:
        """The number of values ``buffer`` holds for ``numel`` elements; the last block may be partial."""
        if buffer.per_block is None:
            return -(-numel // buffer.packed)
        return -(-numel // self.block) * buffer.per_block

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
        cut = {}
        for b in self.buffers:
            first = start // b.packed if b.per_block is None else start // self.block * b.per_block
            cut[b.name] = buffers[b.name][first : first + self.length(b, stop - start)]
        return cut

    def codes(self, buffers: Mapping[str, Tensor], numel: int | None = None) -> Tensor:
        """The code of each element, unpacked; see :meth:`load` for ``numel``."""
        primary = self.buffers[0]
        stored = buffers[primary.name]
        return stored if primary.packed == 1 else unpack(stored, numel)

    @abc.abstractmethod
    def load(self, buffers: Mapping[str, Tensor], numel: int | None = None) -> Tensor:
        """The stored values, flat fp32.

        ``numel`` is how many there are. Packed codes need it, since the last byte may hold one element or two; all
        others tell by their own length.
        """

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


def exp2(x: Tensor) -> Tensor:
    """``2**x``, the same wherever an element lies: torch's fp32 one may differ in the last bit at a vector's end."""
    return torch.exp2(x) if x.device.type == "mps" else torch.exp2(x.double()).float()


def pack(codes: Tensor) -> Tensor:
    """Integer codes of [0, 16) two a byte, the even element in the lower half; a missing last one is 0."""
    pairs = torch.nn.functional.pad(codes.to(torch.uint8), (0, len(codes) % 2)).view(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


def unpack(packed: Tensor, numel: int | None = None) -> Tensor:
    """The inverse of :func:`pack`: the first ``numel`` codes, or all that the bytes have room for, as uint8."""
    return torch.stack([packed & 15, packed >> 4], 1).view(-1)[:numel]
