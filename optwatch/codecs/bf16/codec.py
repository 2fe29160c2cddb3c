"""bfloat16: 2 bytes an element, no blocks.

A second moment moves by a thousandth a step, less than half a unit in the last place of bf16: rounded to nearest it
would never follow. So it is rounded stochastically, up with the probability that keeps the expected value.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optwatch.codecs.base import Buffer, Codec, Kind

LARGEST = torch.finfo(torch.bfloat16).max


class Bf16(Codec):
    """Rounded to nearest, ties to even; finite values beyond the range become the largest finite one."""

    name = "bf16"
    buffers = (Buffer("values", torch.bfloat16),)

    def load(self, buffers: Mapping[str, Tensor], numel: int | None = None) -> Tensor:
        """The values, widened."""
        return buffers["values"].float()

    def store(self, values: Tensor, buffers: Mapping[str, Tensor], random: Tensor | None = None) -> Tensor:
        """Round and write ``values``."""
        inside = torch.where(values.isinf(), values, values.clamp(-LARGEST, LARGEST))
        stored = inside.to(torch.bfloat16)
        buffers["values"].copy_(stored)
        return stored.float()

    def saturated(self, values: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        """Finite values beyond the largest finite bf16."""
        return values.isfinite() & (values.abs() > LARGEST)


class StochasticBf16(Bf16):
    """Rounded stochastically: the upper sixteen bits, plus one with probability (lower sixteen bits) / 65536."""

    name = "bf16_stochastic"
    stochastic = True

    def store(self, values: Tensor, buffers: Mapping[str, Tensor], random: Tensor | None = None) -> Tensor:
        """Round and write ``values``, which are not negative."""
        if random is None:
            raise ValueError("bf16_stochastic rounds stochastically: store() needs random numbers")
        bits = (values.view(torch.int32) + random.to(torch.int32)) & -65536
        rounded = bits.view(torch.float32).clamp(max=LARGEST)
        stored = torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
        buffers["values"].copy_(stored)
        return stored.float()


FORMAT: dict[Kind, Codec] = {Kind.SIGNED: Bf16(), Kind.SECOND_MOMENT: StochasticBf16()}
