"""What the tests of optimizers train: parameters of every memory layout, on gradients drawn from a seed."""

from __future__ import annotations

import torch
from torch import nn

from tests.kernels.agreement import formats

BACKENDS = ("cpu", "reference")
#: Every format on every backend that has kernels for it.
FORMATS_ON_BACKENDS = [(fmt, name) for name in BACKENDS for fmt in formats(name)]
SHAPES = ((64, 80), (5000,), (3,), (), (0,), (100, 100))


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    """Plain ones, and one of each awkward memory layout."""
    gen = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.randn(shape, generator=gen).to(dtype)) for shape in SHAPES]
    image = torch.randn(8, 64, 3, 3, generator=gen).to(dtype)
    made.append(nn.Parameter(image.to(memory_format=torch.channels_last)))
    made.append(nn.Parameter(torch.randn(100, 90, generator=gen).to(dtype).t()))
    made.append(nn.Parameter(torch.randn(100, 200, generator=gen).to(dtype)[:, ::2]))
    return made


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    for i, param in enumerate(params):
        gen = torch.Generator().manual_seed(1000 * seed + i)
        param.grad = torch.randn(param.shape, generator=gen).to(param.dtype)


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def assert_same(left: list[nn.Parameter], right: list[nn.Parameter], **tolerance: float) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
