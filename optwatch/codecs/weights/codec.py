"""Weight formats: how a weight is kept between two steps, in the parameter's own memory and beside it.

A step computes the new weight in fp32. A bf16 parameter holds eight bits of its mantissa, so that most updates of a
fine-tuning round to nothing. The formats that help are codecs whose primary buffer is the parameter, which the user
owns, reads and may write; what a split format keeps beside it is optimizer state.

A split format cuts the bits of an fp32 number in two. The parameter is the bf16 nearest to it (ties away from zero),
the correction what remains, in units of the number's own last place: ``bits(x) == (bits(bf16) << 16) + correction``.
The sum runs across exponents, so powers of two and subnormals are no special cases. Ties to even, which bf16
conversions have elsewhere, would need 65,537 corrections for an even bf16.

A correction belongs to whatever bf16 it lies beside. After a write from outside (a checkpoint, a clamp, pruning) the
weight is the new bf16 value to half a unit in its last place, and is seen unchanged until an update moves it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optwatch.codecs.base import Buffer, Codec
from optwatch.codecs.bf16.codec import LARGEST

VALUES = "values"
CORRECTION = "correction"


class Native(Codec):
    """Rounded to nearest, ties to even, as every conversion to the parameter's type does."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.name = f"native_{str(dtype).removeprefix('torch.')}"
        self.buffers = (Buffer(VALUES, dtype),)

    def load(self, buffers: Mapping[str, Tensor], numel: int | None = None) -> Tensor:
        """The values, widened."""
        return buffers[VALUES].float()

    def store(self, values: Tensor, buffers: Mapping[str, Tensor], random: Tensor | None = None) -> Tensor:
        """Round and write ``values``."""
        buffers[VALUES].copy_(values)
        return self.load(buffers)


class Stochastic(Codec):
    """One of the two neighbouring bf16 values, the nearer one more likely: right on average over the steps.

    Away from zero with probability (lower sixteen bits) / 65536. Finite values stay finite.
    """

    name = "stochastic_bfloat16"
    stochastic = True
    buffers = (Buffer(VALUES, torch.bfloat16),)

    def load(self, buffers: Mapping[str, Tensor], numel: int | None = None) -> Tensor:
        """The values, widened."""
        return buffers[VALUES].float()

    def store(self, values: Tensor, buffers: Mapping[str, Tensor], random: Tensor | None = None) -> Tensor:
        """Round and write ``values``."""
        rounded = _round_up_by(values, _needed(random, self).int(), 16).clamp(-LARGEST, LARGEST)
        buffers[VALUES].copy_(torch.where(values.isfinite(), rounded, values))
        return self.load(buffers)


class Split(Codec):
    """A bf16 and the ``bits`` bits that follow in the number's fp32 form: 16 of them make it exact.

    With fewer, the last bit kept is rounded stochastically: to nearest, the updates of a small learning rate would be
    lost here as they are in bf16.
    """

    def __init__(self, bits: int, dtype: torch.dtype) -> None:
        self.name = f"split{bits}"
        self.lost = 16 - bits  # of the lower half, not kept
        self.stochastic = self.lost > 0
        self.buffers = (Buffer(VALUES, torch.bfloat16), Buffer(CORRECTION, dtype))

    def load(self, buffers: Mapping[str, Tensor], numel: int | None = None) -> Tensor:
        """The bf16 and its correction as one number; a zero from outside beside a negative correction is zero."""
        upper = buffers[VALUES].view(torch.int16).int() << 16
        correction = buffers[CORRECTION].int() << self.lost
        return (upper + correction.maximum(-(upper & 0x7FFFFFFF))).view(torch.float32)

    def store(self, values: Tensor, buffers: Mapping[str, Tensor], random: Tensor | None = None) -> Tensor:
        """Cut ``values`` in two; a NaN is kept in the bf16 alone."""
        if self.lost:
            values = _round_up_by(values, _needed(random, self).int() >> self.lost, self.lost)
        bits = torch.where(values.isnan(), torch.nan, values).view(torch.int32)
        buffers[VALUES].view(torch.int16).copy_(bits + 0x8000 >> 16)
        buffers[CORRECTION].copy_(bits << 16 >> 16 + self.lost)
        return self.load(buffers)


def _round_up_by(values: Tensor, random: Tensor, lost: int) -> Tensor:
    """``values`` without their last ``lost`` bits, away from zero where ``random`` of so many bits says so."""
    rounded = (values.view(torch.int32) + random & -(1 << lost)).view(torch.float32)
    return torch.where(values.isnan(), values, rounded)


def _needed(random: Tensor | None, codec: Codec) -> Tensor:
    if random is None:
        raise ValueError(f"{codec.name} rounds stochastically: store() needs random numbers")
    return random


#: What ``weights=`` takes, and the codec it is for a bf16 parameter. An fp32 parameter is exact in any of them.
WEIGHTS: dict[str, Codec] = {
    "native": Native(torch.bfloat16),
    "stochastic": Stochastic(),
    "split8": Split(8, torch.int8),
    "split16": Split(16, torch.int16),
}
EXACT = Native(torch.float32)
