"""What torch's allocator says of the GPUs that an optimizer's parameters lie on, read without synchronising."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from optwatch.board import Histogram, Series, Table
from optwatch.hooks.figures import NONE, Figures, labelled, renewed

#: Metric -> key of ``torch.cuda.memory_stats``. Peaks are torch's own and never reset here.
GAUGES = {
    "allocated": "allocated_bytes.all.current",
    "reserved": "reserved_bytes.all.current",
    "active": "active_bytes.all.current",
    "inactive_split": "inactive_split_bytes.all.current",
    "allocated_peak": "allocated_bytes.all.peak",
    "reserved_peak": "reserved_bytes.all.peak",
}
COUNTERS = {"retries": "num_alloc_retries", "ooms": "num_ooms"}
#: The key of ``torch.cuda.host_memory_stats``: blocks that are in use and those kept for later.
PINNED = "allocated_bytes.current"


class Allocator:
    """A source of the allocator's figures; without a GPU it has none."""

    table: Table | None = None

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._devices: dict[str, torch.device] = {}
        self._stats: dict[str, Mapping[str, int]] = {}
        self._pinned: float | None = None
        self._gauges = self._counters = NONE
        self.add(parameters)

    def add(self, parameters: Iterable[torch.Tensor]) -> None:
        """Watch the devices of these, too."""
        devices = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
        self._devices |= {_uuid(device): device for device in sorted(devices, key=str)}
        self.read()

    def read(self) -> int:
        """Take the figures anew; some fifty microseconds a device, so not for every step.

        Returns the number of allocations that have failed since the last time.
        """
        before = self._failures()
        self._stats = {uuid: torch.cuda.memory_stats(device) for uuid, device in self._devices.items()}
        self._pinned = pinned_bytes() if self._devices else None
        pinned = [] if self._pinned is None else [(labelled("optwatch.pinned_memory"), self._pinned)]
        self._gauges = renewed(self._gauges, [*self._values(GAUGES), *pinned])
        self._counters = renewed(self._counters, self._values(COUNTERS))
        return sum(count - before[uuid] for uuid, count in self._failures().items() if uuid in before)

    def gauges(self) -> Figures:
        """Bytes, by device, and those of pinned host memory."""
        return self._gauges

    def counters(self) -> Figures:
        """Retries after flushing the cache, and failures, by device."""
        return self._counters

    def histograms(self) -> Sequence[tuple[Series, Histogram]]:
        """None."""
        return ()

    def infos(self) -> Sequence[Series]:
        """None."""
        return []

    def _failures(self) -> dict[str, int]:
        return {uuid: stats.get(COUNTERS["ooms"], 0) for uuid, stats in self._stats.items()}

    def _values(self, keys: Mapping[str, str]) -> list[tuple[Series, float]]:
        return [
            (labelled(f"optwatch.allocator.{name}", ("gpu", uuid)), float(stats.get(key, 0)))
            for uuid, stats in self._stats.items()
            for name, key in keys.items()
        ]


def pinned_bytes() -> float | None:
    """Bytes of host memory that torch keeps pinned; None before CUDA is in use, or where this torch does not tell."""
    stats: Mapping[str, int] = getattr(torch.cuda, "host_memory_stats", dict)()
    return float(stats[PINNED]) if PINNED in stats else None


def _uuid(device: torch.device) -> str:
    """The device as NVML names it."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
