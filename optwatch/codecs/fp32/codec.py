"""Plain fp32: the exact state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optwatch.codecs.base import Buffer, Codec, Kind


class Fp32(Codec):
    """Values as they are, 4 bytes an element."""

    name = "fp32"
    buffers = (Buffer("values", torch.float32),)

    def load(self, buffers: Mapping[str, Tensor], numel: int | None = None) -> Tensor:
        """The values themselves; the caller must not write into them."""
        return buffers["values"]

    def store(self, values: Tensor, buffers: Mapping[str, Tensor], random: Tensor | None = None) -> Tensor:
        """Copy ``values``."""
        buffers["values"].copy_(values)
        return values


FORMAT: dict[Kind, Codec] = dict.fromkeys(Kind, Fp32())
