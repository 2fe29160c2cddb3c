"""Values to store, and what becomes of them."""

from __future__ import annotations

import torch

from optwatch.codecs import Codec, Kind

CPU = torch.device("cpu")


def uniform(numel: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 65536, (numel,), generator=torch.Generator().manual_seed(seed)).float()


def round_trip(
    codec: Codec, values: torch.Tensor, seed: int = 3
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    buffers = codec.allocate(len(values), CPU)
    stored = codec.store(values, buffers, uniform(len(values), seed))
    torch.testing.assert_close(stored, codec.load(buffers, len(values)), rtol=0, atol=0, equal_nan=True)
    return stored, buffers


def sample(kind: Kind, numel: int, scale: float = 1e-4) -> torch.Tensor:
    values = scale * torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    return values.square() if kind is Kind.SECOND_MOMENT else values


#: Lower halves of an fp32 number where rounding to a bf16, or to eight bits more, changes its mind.
LOWER_HALVES = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x100,
    0x7F7F,
    0x7F80,
    0x7FFF,
    0x8000,
    0x8001,
    0x80FF,
    0xFF7F,
    0xFF80,
    0xFFFF,
)


def floats(upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """Every combination of these halves of the bits of fp32 numbers."""
    return ((upper.int() << 16)[:, None] | lower.int()).flatten().view(torch.float32)


def every_upper_half() -> torch.Tensor:
    """Every sign, exponent and bf16 mantissa, each with all of ``LOWER_HALVES``: zeros, subnormals, NaN and Inf too."""
    return floats(torch.arange(65536), torch.tensor(LOWER_HALVES))
