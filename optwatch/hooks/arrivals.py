"""Single numbers on their way from the device to the host, without anyone waiting."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch

#: Numbers under way at once. A device that is further behind loses the newest.
DEPTH = 256

#: Has ``yes`` in a thread that looks on while others may capture a CUDA graph: asking for an event would end that.
BESIDE = threading.local()

Deliver = Callable[[float], None]


class Arrivals:
    """A queue of scalars; what lies on the host is delivered at once, what lies on a GPU when it has arrived."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[torch.Tensor, torch.cuda.Event, Deliver]] = deque()

    def send(self, value: float | torch.Tensor, deliver: Deliver) -> None:
        """Have ``deliver`` called with the number.

        Raises:
            ValueError: the tensor has more than one element, or too many numbers are under way.
            TypeError: it is no number, or lies on a device that cannot be read without waiting for it.
        """
        if not isinstance(value, torch.Tensor):
            deliver(float(value))
            return
        if value.numel() != 1:
            raise ValueError(f"expected one number, got a tensor of shape {tuple(value.shape)}")
        value = value.detach()
        if value.device.type == "cpu":
            deliver(float(value))
        elif value.device.type == "cuda":
            self._copy(value, deliver)
        else:
            raise TypeError(
                f"a tensor on {value.device} cannot be read without waiting for it; give a number"
            )

    def poll(self) -> None:
        """Deliver what has arrived, oldest first."""
        if getattr(BESIDE, "yes", False):
            return
        while self._under_way and self._under_way[0][1].query():
            host, _, deliver = self._under_way.popleft()
            deliver(float(host))

    def drain(self) -> None:
        """Deliver everything, waiting for the device; only for the end of a run."""
        for _, event, _ in self._under_way:
            event.synchronize()
        self.poll()

    def _copy(self, value: torch.Tensor, deliver: Deliver) -> None:
        if torch.cuda.is_current_stream_capturing():
            return  # a graph would copy into a buffer that nobody reads
        self.poll()  # a loop that replays a graph has no steps that would
        if len(self._under_way) == DEPTH:
            raise ValueError(f"the device is more than {DEPTH} numbers behind")
        # Of the same dtype: converting would take memory on the device.
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(value.device))
        self._under_way.append((host, event, deliver))
