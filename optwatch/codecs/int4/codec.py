"""Half a byte an element: powers for signed slots, logarithms for second moments; 0.53125 bytes with the scales.

Sixteen codes have to be where the values are, so each block has a grid of its own.

A first moment is scaled by the *signed* largest element of its block, which therefore always gets the code 8 whatever
its sign; that frees the sixteenth code, which a symmetric grid would waste. The levels are the powers (k / 8)**p. A
block of similar magnitudes wants p near 1.5, one with a heavy tail up to 4.5: how large the mean magnitude is beside
the largest tells which, and two bits of the scale remember it.

A second moment is divided by, through its square root, so it is kept with a bounded *relative* error on a logarithmic
grid, and code 0 means exactly zero. Its rounding is stochastic and unbiased in the *logarithm*: then an average of
squared gradients drifts until the mean of (exact / stored) is 1, which is the mean square of the update. Unbiased in
the value, as in the format int8, where codes are close, stored values a factor of two apart would scatter the update
upwards by Jensen's inequality. A few values far below the others would stretch the grid for all: it ends two standard
deviations below the mean logarithm, and what lies below is kept at its end, which makes their update smaller, never
larger.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optwatch.codecs.base import Buffer, Codec, Kind, blocks, exp2, pack, unpack

SMALLEST = torch.finfo(torch.float32).tiny  # 2**-126: smaller magnitudes are not told apart
LARGEST = torch.finfo(torch.float32).max

POWERS = (1.5, 2.0, 3.0, 4.5)
#: Mean over largest magnitude of a block below which the next power is taken.
THRESHOLDS = (0.22, 0.14, 0.08)
CODES = torch.arange(-7, 9)  # in ascending order of the levels
LEVELS = torch.stack([CODES.sign() * (CODES.abs().double() / 8) ** p for p in POWERS]).float()  # [power, 16]
MIDDLES = (LEVELS[:, 7:-1] + LEVELS[:, 8:]) / 2  # [power, 8]: between the levels of 0, 1 … 8
SCALE_ROUNDING = 2.0**-6  # relative error of a scale: five bits after the point

LAST = 14  # steps of a logarithmic grid
DEVIATIONS = 2.0  # how far below the mean logarithm a grid reaches
SMALLEST_STEP = 2.0**-10  # octaves; finer grids would drown in the rounding of fp32 logarithms
WIDEST_RANGE = 126.0  # octaves of a block


class Int4Power(Codec):
    """Signed slots: ``x = sign(code) * |code / 8|**p * scale`` with code of -7 … 8, kept modulo 16.

    ``scale`` is the element of a block of 64 with the largest magnitude, with its sign (of two that are the same after
    rounding, the positive one), as bf16 with five bits after the point; the two bits below choose p of 1.5, 2, 3 and
    4.5. A block with a non-finite element has scale NaN; magnitudes below 2**-126 count as zero.
    """

    name = "int4_power"
    block = 64
    buffers = (Buffer("codes", torch.uint8, packed=2), Buffer("scale", torch.bfloat16, per_block=1))

    def load(self, buffers: Mapping[str, Tensor], numel: int | None = None) -> Tensor:
        """Decode."""
        codes = unpack(buffers["codes"], numel)
        scale, power = _split(buffers["scale"])
        index = (blocks(codes, self.block).long() + 7) % 16  # where a code stands in CODES
        levels = LEVELS.to(codes.device)[power].gather(1, index)
        return (levels * scale[:, None]).view(-1)[: len(codes)]

    def store(self, values: Tensor, buffers: Mapping[str, Tensor], random: Tensor | None = None) -> Tensor:
        """Encode, rounding to the nearest level; the smaller magnitude of two that are as near."""
        x = blocks(values, self.block)
        highest, lowest = x.amax(1).clamp(min=0), (-x).amax(1).clamp(min=0)
        largest = highest.maximum(lowest)
        finite = largest.isfinite()
        top = torch.where(_rounded(highest) >= _rounded(lowest), largest, -largest)
        top = top.masked_fill(~finite | (largest < SMALLEST), 0.0)
        mean = _sum(x.abs()) / self.block  # the last block is filled up with zeros
        power = (mean[:, None] < largest[:, None] * torch.tensor(THRESHOLDS, device=x.device)).sum(1)
        head = _join(top, power)
        scale = _split(head)[0][:, None]
        scaled = torch.where(scale == 0, 0.0, x / scale).nan_to_num(0.0, 0.0, 0.0)
        codes = torch.zeros(x.shape, dtype=torch.int16, device=x.device)
        for middle in MIDDLES.to(x.device)[power].unbind(1):
            codes += scaled.abs() > middle[:, None]
        codes = torch.where(scaled < 0, -codes.clamp(max=7), codes)
        buffers["codes"].copy_(pack((codes % 16).masked_fill(~finite[:, None], 0).view(-1)[: len(values)]))
        buffers["scale"].copy_(torch.where(finite, head, torch.nan))
        return self.load(buffers, len(values))

    def saturated(self, values: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        """Values beyond the scale and its rounding, which is possible only at the end of the range."""
        scale = _split(buffers["scale"])[0].abs()[:, None]
        beyond = (blocks(values, self.block).abs() > scale * (1 + SCALE_ROUNDING)) & (scale > 0)
        return beyond.view(-1)[: len(values)] & values.isfinite()


def _sum(values: Tensor) -> Tensor:
    """The sum of each row, half added to half: an order that vectors of any length can keep to."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        values = values[:, :half] + values[:, half:]
    return values[:, 0]


def _join(top: Tensor, power: Tensor) -> Tensor:
    """A scale, rounded to nearest but to a finite value, and the index of a power in one bf16."""
    sign = torch.where(top < 0, -0x8000, 0)
    return ((_rounded(top.abs()) >> 16 | power.int()) + sign).to(torch.int16).view(torch.bfloat16)


def _rounded(magnitude: Tensor) -> Tensor:
    """The bits of a scale."""
    return (magnitude.view(torch.int32) + (1 << 17) & -(1 << 18)).clamp(max=0x7F7C0000)


def _split(head: Tensor) -> tuple[Tensor, Tensor]:
    """The scale, fp32, and the index of the power that a bf16 holds."""
    bits = head.view(torch.int16).int()
    return ((bits & -4) << 16).view(torch.float32), (bits & 3).long()


class Int4Log(Codec):
    """Second moments: code 0 is exactly 0; code c > 0 is ``lowest * 2**((c - 1) * step)``.

    ``range`` holds (lowest, step) for each block of 256: the lowest value of the grid, at least 2**-126, and the
    distance of two codes in octaves, at least 2**-10; the highest is the largest value. The lowest is the smallest
    non-zero value, or two standard deviations below the mean logarithm if that is more. A block with a non-finite
    element decodes to NaN.
    """

    name = "int4_log"
    block = 256
    stochastic = True
    buffers = (Buffer("codes", torch.uint8, packed=2), Buffer("range", torch.float32, per_block=2))

    def load(self, buffers: Mapping[str, Tensor], numel: int | None = None) -> Tensor:
        """Decode."""
        codes = unpack(buffers["codes"], numel)
        lowest, step = (column[:, None] for column in buffers["range"].view(-1, 2).unbind(1))
        code = blocks(codes, self.block).float()
        values = torch.where(code > 0, lowest * exp2((code - 1) * step), 0.0)
        return values.clamp(max=LARGEST).view(-1)[: len(codes)]  # the last bits may go beyond it

    def store(self, values: Tensor, buffers: Mapping[str, Tensor], random: Tensor | None = None) -> Tensor:
        """Encode, rounding stochastically to one of the two neighbours."""
        if random is None:
            raise ValueError("int4_log rounds stochastically: store() needs random numbers")
        v = blocks(values, self.block)
        largest = v.amax(1, keepdim=True)
        finite, empty = largest.isfinite(), largest <= 0
        high = torch.where(finite & ~empty, largest, 1.0).clamp(min=SMALLEST)
        some = (v > 0) & finite
        # Octaves relative to the largest value, never above 0: absolute ones would lose up to seven bits.
        octaves = torch.log2(torch.where(some, v, high).clamp(min=SMALLEST) / high).clamp(min=-WIDEST_RANGE)
        count = some.sum(1, keepdim=True).clamp(min=1)
        mean = _sum(octaves)[:, None] / count
        apart = torch.where(some, octaves - mean, 0.0)
        deviation = (_sum(apart.square())[:, None] / count).sqrt()
        low = octaves.amin(1, keepdim=True).maximum(mean - DEVIATIONS * deviation)

        step = (-low / LAST).clamp(min=SMALLEST_STEP)
        position = ((octaves - low) / step).clamp(min=0)
        below = position.floor().clamp(max=LAST - 1)
        up = blocks(random, self.block) + 0.5 < (position - below) * 65536
        codes = torch.where(some, 1 + below + up.float(), 0.0).masked_fill(~finite, 1.0)
        grid = torch.cat([(high * exp2(low)).clamp(min=SMALLEST), step], 1)
        grid = grid.masked_fill(empty, 0.0).masked_fill(~finite, torch.nan)
        buffers["codes"].copy_(pack(codes.view(-1)[: len(values)]))
        buffers["range"].copy_(grid.view(-1))
        return self.load(buffers, len(values))


FORMAT: dict[Kind, Codec] = {Kind.SIGNED: Int4Power(), Kind.SECOND_MOMENT: Int4Log()}
