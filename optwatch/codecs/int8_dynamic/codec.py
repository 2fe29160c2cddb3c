"""One byte an element with the dynamic map of 8-bit optimizers (Dettmers et al., 2022): for the peers' checkpoints.

The buffers are bit by bit those of bitsandbytes and torchao: codes into a map of 256 values, and the largest magnitude
of each block of 256 as fp32. The nearest value of the map is found exactly, ties upwards, as torchao does. Two things
are done better within the same layout. A second moment that is not zero never gets the code for zero, by which an
update would explode; it gets the smallest code instead. And there is no floor of 1e-12 under the largest magnitude,
below which torchao loses gradients of 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optwatch.codecs.base import Buffer, Codec, Kind, blocks

SMALLEST = torch.finfo(torch.float32).tiny  # 2**-126: smaller largest magnitudes are not told apart
DECADES = 7


def dynamic_map(kind: Kind) -> Tensor:
    """The 256 values of the map in ascending order, fp32.

    Decade i of 7 has 2**i values for each sign (2**(i + 1) where there is only one), the midpoints of equal parts of
    [0.1, 1] times 10**(i - 6); 0 and 1 are added. Every bit counts, so it is computed in fp32, as the peers do.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(DECADES):
        parts = 2 ** (decade + (kind is Kind.SECOND_MOMENT))
        edges = _edges(parts)
        middles = 10.0 ** (decade - DECADES + 1) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles] if kind is Kind.SIGNED else [middles]
    return torch.cat(values).sort().values


def _edges(parts: int) -> Tensor:
    """What ``torch.linspace(0.1, 1, parts + 1)`` gives the peers on a processor with fused multiplication.

    Each is counted from the nearer end and rounded once. Without such instructions it is rounded twice: the last bit
    of torch's own depends on the processor.
    """
    start, count = torch.tensor(0.1), torch.arange(parts + 1, dtype=torch.float64)
    step = ((1 - start) / parts).double()
    upwards, downwards = start.double() + step * count, 1 - step * (parts - count)
    return torch.where(count < (parts + 1) // 2, upwards, downwards).float()


class Int8Dynamic(Codec):
    """``x = map[code] * absmax``; a block with a non-finite element has absmax NaN and decodes to NaN."""

    block = 256
    buffers = (Buffer("codes", torch.uint8), Buffer("absmax", torch.float32, per_block=1))

    def __init__(self, name: str, kind: Kind) -> None:
        self.name = name
        self.map = dynamic_map(kind)
        self.zero = int((self.map == 0).nonzero())
        self.second_moment = kind is Kind.SECOND_MOMENT

    def allocate(self, numel: int, device: torch.device) -> dict[str, Tensor]:
        """Codes of zero, as the peers start."""
        buffers = super().allocate(numel, device)
        buffers["codes"].fill_(self.zero)
        return buffers

    def load(self, buffers: Mapping[str, Tensor], numel: int | None = None) -> Tensor:
        """Decode."""
        codes = buffers["codes"]
        values = self.map.to(codes.device)[codes.int()]
        return (blocks(values, self.block) * buffers["absmax"][:, None]).view(-1)[: len(codes)]

    def store(self, values: Tensor, buffers: Mapping[str, Tensor], random: Tensor | None = None) -> Tensor:
        """Encode, rounding to the nearest value of the map."""
        x, table = blocks(values, self.block), self.map.to(values.device)
        absmax = x.abs().amax(1, keepdim=True)
        if self.second_moment:
            absmax = torch.where(absmax > 0, absmax.clamp(min=SMALLEST), absmax)
        empty = absmax < SMALLEST
        scaled = x / absmax.masked_fill(empty, 1.0)
        below = (torch.bucketize(scaled, table, right=True) - 1).clamp(0, 255)
        above = (below + 1).clamp(max=255)
        up = scaled - table[below] >= (table[above] - table[below]) * 0.5
        codes = torch.where(up, above, below)
        if self.second_moment:
            codes = torch.where(x > 0, codes.clamp(min=self.zero + 1), codes)
        codes = codes.masked_fill(empty | ~absmax.isfinite(), self.zero)
        buffers["codes"].copy_(codes.view(-1)[: len(values)])
        buffers["absmax"].copy_(
            absmax.masked_fill(empty, 0.0).masked_fill(~absmax.isfinite(), torch.nan)[:, 0]
        )
        return self.load(buffers)


FORMAT: dict[Kind, Codec] = {
    Kind.SIGNED: Int8Dynamic("int8_dynamic_signed", Kind.SIGNED),
    Kind.SECOND_MOMENT: Int8Dynamic("int8_dynamic_unsigned", Kind.SECOND_MOMENT),
}
