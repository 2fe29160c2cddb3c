"""One byte an element in the floating-point format e4m3: for torchao's checkpoints.

The buffers are those of torchao's AdamWFp8: e4m3 values (three bits after the point, the smallest 2**-9, the largest
448), and the largest magnitude of each block of 256 over 448 as fp32.

Rounded to nearest, two values are 6 to 12 % apart, and a second moment, which moves by a thousandth a step, would stand
still; what rounds to zero would make the update explode. So second moments are rounded stochastically, unbiased in the
value, and one that is not zero is at least 2**-9. There is no floor of 1e-12 under the largest magnitude, below which
torchao loses gradients of 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optwatch.codecs.base import Buffer, Codec, Kind, blocks

LARGEST = 448.0  # of e4m3
NORMAL = 2.0**-6  # smallest e4m3 value with a full mantissa; below it values lie UNIT apart
UNIT = 2.0**-9
FINEST = 2.0**-117  # smallest scale, so that scale * UNIT is a normal fp32 number


class Fp8(Codec):
    """``x = code * scale``, rounded to nearest, ties to even; a block with a non-finite element decodes to NaN."""

    name = "fp8"
    block = 256
    buffers = (Buffer("codes", torch.float8_e4m3fn), Buffer("scale", torch.float32, per_block=1))

    def load(self, buffers: Mapping[str, Tensor], numel: int | None = None) -> Tensor:
        """Decode."""
        codes = buffers["codes"].float()
        return (blocks(codes, self.block) * buffers["scale"][:, None]).view(-1)[: len(codes)]

    def store(self, values: Tensor, buffers: Mapping[str, Tensor], random: Tensor | None = None) -> Tensor:
        """Encode; every block's largest magnitude becomes 448."""
        x = blocks(values, self.block)
        largest = x.abs().amax(1, keepdim=True)
        empty, finite = largest <= 0, largest.isfinite()
        scale = (largest / LARGEST).clamp(min=FINEST)
        scaled = (x / scale).masked_fill(empty | ~finite, 0.0).clamp(-LARGEST, LARGEST)
        codes = self.round(scaled, random).view(-1)[: len(values)]
        buffers["codes"].copy_(codes.to(torch.float8_e4m3fn))
        buffers["scale"].copy_(scale.masked_fill(empty, 0.0).masked_fill(~finite, torch.nan)[:, 0])
        return self.load(buffers)

    def round(self, scaled: Tensor, random: Tensor | None) -> Tensor:
        """``scaled``, as blocks, to values of e4m3; what is not one is rounded to nearest by the conversion."""
        return scaled


class StochasticFp8(Fp8):
    """Second moments, rounded stochastically to one of the two neighbours, never to zero."""

    name = "fp8_stochastic"
    stochastic = True

    def round(self, scaled: Tensor, random: Tensor | None) -> Tensor:
        """Up with the probability that keeps the expected value."""
        if random is None:
            raise ValueError("fp8_stochastic rounds stochastically: store() needs random numbers")
        uniform = blocks(random, self.block)
        # e4m3 keeps the upper three of fp32's 23 mantissa bits: add 20 random bits, the lower four of them zero.
        bits = (scaled.view(torch.int32) + (uniform.to(torch.int32) << 4)) & -(1 << 20)
        small = torch.floor(scaled / UNIT + uniform / 65536) * UNIT
        rounded = torch.where(scaled < NORMAL, small, bits.view(torch.float32).clamp(max=LARGEST))
        return torch.where(scaled > 0, rounded.clamp(min=UNIT), 0.0)


FORMAT: dict[Kind, Codec] = {Kind.SIGNED: Fp8(), Kind.SECOND_MOMENT: StochasticFp8()}
