"""One byte an element: cube roots for signed slots, logarithms for second moments.

A first moment needs range as well as precision: the cube root of x over the block's largest magnitude gives 21
octaves in 127 steps, about 2.4 % apart at the top, in closed form.

A second moment is divided by, through its square root, so an error towards zero makes the update explode: it is kept
with a bounded *relative* error on a logarithmic grid between the block's smallest and largest non-zero value, and
code 0 means exactly zero. It moves by a thousandth a step, far less than a code, so the rounding is stochastic and
unbiased in the value: unbiased in the code would drift upwards, because the grid is convex.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from optwatch.codecs.base import Buffer, Codec, Kind, blocks, exp2

SMALLEST = torch.finfo(torch.float32).tiny  # 2**-126: smaller magnitudes are not told apart
LARGEST = torch.finfo(torch.float32).max
HIGHEST = (
    2 - 2.0**-13
) * 2.0**127  # of a grid: the last bits of its exponents must not carry a value beyond fp32
LAST = 1.75 * 2.0**127  # that a grid begins at: no code of the smallest step lies beyond fp32
SMALLEST_STEP = 2.0**-12  # octaves; finer grids would drown in the rounding of fp32 logarithms
WIDEST_RANGE = 2.0**126  # largest over smallest value of a block, so that 2**(code * step) stays finite
UNIT = 1 / 127**3


def round_up_to_bf16(values: Tensor) -> Tensor:
    """The smallest bf16 not below each finite, non-negative value; at most the largest finite one."""
    bits = (values.view(torch.int32) + 0xFFFF) & -65536
    return bits.clamp(max=0x7F7F0000).view(torch.float32)


class Int8Cubic(Codec):
    """Signed slots: ``x = (code / 127)**3 * scale``, and with r = 127 * cbrt(|x| / scale) ``code = round(r - 1/(4r))``.

    That is the nearest *value*: the middle of c**3 and (c + 1)**3 is h**3 + 3h/4 with h = c + 1/2, the cube of
    h + 1/(4h) to a per cent, for the first code to two. The nearest root would make the smallest values up to eight
    times larger, which are many where a block is wide.

    ``scale`` is the largest magnitude of a block of 128, rounded up to bf16. A block with a non-finite element has
    scale NaN and decodes to NaN; magnitudes below 2**-126 count as zero.
    """

    name = "int8_cubic"
    block = 128
    buffers = (Buffer("codes", torch.int8), Buffer("scale", torch.bfloat16, per_block=1))

    def load(self, buffers: Mapping[str, Tensor], numel: int | None = None) -> Tensor:
        """Decode."""
        codes = buffers["codes"]
        cubes = blocks(codes, self.block).float() ** 3
        return (cubes * (buffers["scale"].float() * UNIT)[:, None]).view(-1)[: len(codes)]

    def store(self, values: Tensor, buffers: Mapping[str, Tensor], random: Tensor | None = None) -> Tensor:
        """Encode, rounding to the nearest value."""
        x = blocks(values, self.block)
        largest = x.abs().amax(1)
        scale = torch.where(largest < SMALLEST, 0.0, round_up_to_bf16(largest.nan_to_num(0.0, 0.0)))
        magnitude = (x.abs() / scale[:, None]).clamp(max=1.0).nan_to_num(0.0, 0.0)
        root = magnitude.double().pow(1 / 3).float() if x.device.type != "mps" else magnitude.pow(1 / 3)
        position = 127 * root
        position -= 0.25 / position
        codes = torch.floor(position.clamp(min=0.0) + 0.5).copysign(x).masked_fill(scale[:, None] <= 0, 0.0)
        buffers["codes"].copy_(codes.view(-1)[: len(values)])
        buffers["scale"].copy_(torch.where(largest.isfinite(), scale, torch.nan))
        return self.load(buffers)

    def saturated(self, values: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        """Values beyond the scale, which is possible only near the end of bf16's range."""
        beyond = blocks(values, self.block).abs() > buffers["scale"].float()[:, None]
        # A block of magnitudes too small to tell apart has scale 0: its values underflow, they are not cut off.
        beyond &= (buffers["scale"] > 0)[:, None]
        return beyond.view(-1)[: len(values)] & values.isfinite()


class Int8Log(Codec):
    """Second moments: code 0 is exactly 0; code c > 0 is ``lowest * 2**((c - 1) * step)``.

    ``grid`` holds (lowest, step) for each block of 256: its smallest non-zero value, at least 2**-126, and the
    distance of two codes in octaves, at least 2**-12. The grid ends at its largest value, or 6e-5 below the largest
    fp32 number. A block with a non-finite element decodes to NaN.
    """

    name = "int8_log"
    block = 256
    stochastic = True
    buffers = (Buffer("codes", torch.uint8), Buffer("grid", torch.float32, per_block=2))

    def load(self, buffers: Mapping[str, Tensor], numel: int | None = None) -> Tensor:
        """Decode."""
        codes = buffers["codes"]
        lowest, step = (column[:, None] for column in buffers["grid"].view(-1, 2).unbind(1))
        code = blocks(codes, self.block).float()
        values = torch.where(code > 0, lowest * exp2((code - 1) * step), 0.0)
        return values.clamp(max=LARGEST).view(-1)[: len(codes)]  # the last bits may go beyond it

    def store(self, values: Tensor, buffers: Mapping[str, Tensor], random: Tensor | None = None) -> Tensor:
        """Encode, rounding stochastically to one of the two neighbours."""
        if random is None:
            raise ValueError("int8_log rounds stochastically: store() needs random numbers")
        v = blocks(values, self.block)
        largest = v.amax(1, keepdim=True)
        smallest = torch.where(v > 0, v, torch.inf).amin(1, keepdim=True)
        finite = largest.isfinite()
        empty = largest <= 0
        high = torch.where(finite & ~empty, largest, 1.0).clamp(SMALLEST, HIGHEST)
        low = torch.where(finite & ~empty, smallest, 1.0).clamp(SMALLEST, LAST).maximum(high / WIDEST_RANGE)

        # Logarithms relative to the lowest value: absolute ones would lose up to seven bits.
        inverse = 1 / low
        step = (torch.log2(high * inverse) / 254).clamp(min=SMALLEST_STEP)
        position = torch.log2(v.maximum(low) * inverse) / step
        below = position.floor().clamp(0, 253)
        fraction = (position - below).clamp(0, 1)
        probability = torch.expm1(fraction * step * math.log(2)) / torch.expm1(step * math.log(2))
        up = blocks(random, self.block) + 0.5 < probability * 65536
        codes = torch.where(v > 0, 1 + below + up.float(), 0.0)

        codes = torch.where(finite, codes, 1.0)
        grid = torch.cat([low, step], 1).masked_fill(empty, 0.0).masked_fill(~finite, torch.nan)
        buffers["codes"].copy_(codes.view(-1)[: len(values)])
        buffers["grid"].copy_(grid.view(-1))
        return self.load(buffers)


FORMAT: dict[Kind, Codec] = {Kind.SIGNED: Int8Cubic(), Kind.SECOND_MOMENT: Int8Log()}
