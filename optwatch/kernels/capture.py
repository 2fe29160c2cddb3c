"""What a CUDA graph may read: tables that are sent to the device before it is captured, or from memory that stays.

A graph replays copies from the very host addresses that it was captured with, and nothing of Python. So what the host
knows (addresses of gradients, options that are numbers) is a constant of the graph: it must lie in memory that neither
the allocator nor a later step writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Captures in a row, without an ordinary step between them, that find pinned memory for what has changed.
SPARES = 4


def capturing(device: torch.device) -> bool:
    """Whether what is launched on ``device`` now goes into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Sent:
    """An array of the host's on a device, sent again only where it has changed, and never over an older one."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = tuple(shape), dtype, device
        self._spare: list[Tensor] = []
        self._held: list[Tensor] = []  # what graphs read, on both sides
        self._known: tuple[bytes, Tensor] | None = None
        self._restock()

    def send(self, values: NDArray[Any]) -> Tensor:
        """``values`` on the device; whoever gets them must not write them.

        Raises:
            RuntimeError: a capture finds no memory left that it may read from.
        """
        content, captured = values.tobytes(), capturing(self._device)
        if self._known is None or self._known[0] != content:
            if captured and not self._spare:
                raise RuntimeError(
                    f"more than {SPARES} graphs were captured in a row: take an ordinary step() between them"
                )
            host = self._spare.pop() if captured else self._pinned()
            host.numpy()[...] = values
            there = host.to(self._device, non_blocking=True, copy=True)
            self._held += [host, there] if captured else []
            if captured:  # the next step outside of the graph must not find what only a replay fills
                return there
            self._known = content, there
        if captured:
            self._held.append(self._known[1])
        elif not self._spare:
            self._restock()
        return self._known[1]

    def _pinned(self, *more: int) -> Tensor:
        return torch.empty((*more, *self._shape), dtype=self._dtype, pin_memory=self._device.type == "cuda")

    def _restock(self) -> None:
        """Pinned memory cannot be had in a capture."""
        self._spare = list(self._pinned(SPARES))


def addresses_of(grads: Sequence[Tensor | None]) -> NDArray[np.int64]:
    """Where the gradients lie, 0 where there is none."""
    return np.array([0 if grad is None else grad.data_ptr() for grad in grads], np.int64)
