"""Two small training tasks for the convergence benchmark, made from nothing but torch and Python's own files.

``gpt``: a byte-level language model on the source text of Python's standard library, a tenth of the files held out.
``vit``: images of ten smooth random patterns, rolled by up to four pixels and under noise, to be told apart.

A task gives the model for a seed, the loss of a training batch for (seed, step), and the loss on data held out, which
is the same for all seeds. Nearly all matrices have at least 4,096 elements, so that their optimizer state is quantised.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

WIDTH, HEADS, LAYERS = 64, 4, 2
CONTEXT, BYTES = 64, 256
IMAGE, PATCH, CLASSES, NOISE = 32, 8, 10, 2.0


class Task(NamedTuple):
    """What is trained, on what, and how its loss is measured."""

    model: Callable[[], nn.Module]
    train: Callable[[nn.Module, int, int], Tensor]  # model, seed, step
    held_out: Callable[[nn.Module], float]
    data: str  # what the data are, with a hash where they depend on the machine
    rate: float


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, WIDTH]`` to the same."""
        heads = self.qkv(self.before_attention(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.before_mlp(x))


class Transformer(nn.Module):
    """Tokens, embedded by ``embed``, to logits; averaged over the tokens first where it is no language model."""

    def __init__(self, embed: nn.Module, tokens: int, outputs: int, causal: bool) -> None:
        super().__init__()
        self.embed, self.causal = embed, causal
        self.position = nn.Parameter(torch.randn(tokens, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block(causal) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, for each token in a language model, for each image otherwise."""
        x = self.norm(self.blocks(self.embed(x) + self.position))
        return self.head(x if self.causal else x.mean(1))


def generator(*numbers: int) -> torch.Generator:
    """A stream of its own for every combination of numbers."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def gpt() -> Task:
    """The language model."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    learn = b"".join(path.read_bytes() for i, path in enumerate(files) if i % 10)
    kept = b"".join(path.read_bytes() for i, path in enumerate(files) if i % 10 == 0)
    text, other = (torch.frombuffer(bytearray(data), dtype=torch.uint8).long() for data in (learn, kept))
    window = torch.arange(CONTEXT + 1)

    def loss(model: nn.Module, data: Tensor, count: int, stream: torch.Generator) -> Tensor:
        starts = torch.randint(len(data) - CONTEXT, (count, 1), generator=stream)
        rows = data[starts + window]
        return cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    return Task(
        model=lambda: Transformer(nn.Embedding(BYTES, WIDTH), CONTEXT, BYTES, causal=True),
        train=lambda model, seed, step: loss(model, text, 8, generator(1, seed, step)),
        held_out=lambda model: loss(model, other, 512, generator(2)).item(),
        data=f"{len(text):,} bytes of Python's library (sha256 {hashlib.sha256(learn + kept).hexdigest()[:12]})",
        rate=2e-3,
    )


def vit() -> Task:
    """The classifier of images."""
    coarse = torch.randn(CLASSES, 1, IMAGE // 4, IMAGE // 4, generator=generator(3))
    patterns = nn.functional.interpolate(coarse, size=(IMAGE, IMAGE), mode="bilinear")

    def loss(model: nn.Module, count: int, stream: torch.Generator) -> Tensor:
        labels = torch.randint(CLASSES, (count,), generator=stream)
        shift = torch.randint(-4, 5, (count, 2), generator=stream)
        rows, columns = ((torch.arange(IMAGE) + shift[:, i, None]) % IMAGE for i in (0, 1))
        images = patterns[labels[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
        images = images + NOISE * torch.randn(images.shape, generator=stream)
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).reshape(count, -1, PATCH * PATCH)
        return cross_entropy(model(patches), labels)

    tokens = (IMAGE // PATCH) ** 2
    return Task(
        model=lambda: Transformer(nn.Linear(PATCH * PATCH, WIDTH), tokens, CLASSES, causal=False),
        train=lambda model, seed, step: loss(model, 32, generator(4, seed, step)),
        held_out=lambda model: loss(model, 4096, generator(5)).item(),
        data=f"{CLASSES} patterns of {IMAGE} × {IMAGE}, drawn anew for each batch, noise of {NOISE:g}",
        rate=1e-3,
    )


def schedule(step: int, steps: int) -> float:
    """A factor of the learning rate: warm-up over a tenth, then a cosine to a twentieth."""
    warm = steps // 10
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


TASKS = {"gpt": gpt, "vit": vit}
