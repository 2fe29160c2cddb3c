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
