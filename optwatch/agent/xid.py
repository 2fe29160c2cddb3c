"""XID errors: what the driver says went wrong on a device. They are events: whoever does not listen misses them."""

from __future__ import annotations

import ctypes
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from optwatch.exporters.base import Point

log = logging.getLogger("optwatch.agent")

_AT_ONCE = 1000  # events that are taken in before other devices have their turn


class Xids:
    """Counts the errors of each device since the agent listens. Not for several threads at once."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[int]] = {}  # device -> number of the error -> how often
        self._started = time.time()
        self._set: Any = None
        self._names: dict[int, str] = {}  # handle, as a number -> device
        self._unsupported: set[str] = set()

    def points(self) -> Iterator[tuple[str, Point]]:
        """The counter of each device that can tell, and the numbers that it told."""
        for gpu, counts in list(self._counts.items()):
            yield (
                "optwatch.device.xid_errors",
                Point({"gpu": gpu}, float(sum(counts.values())), self._started),
            )
            for number in sorted(counts):
                yield "optwatch.device_xid", Point({"gpu": gpu, "xid": str(number)}, 1.0)

    def hear(self, nvml: Any, handles: Mapping[str, Any]) -> None:
        """Take in what has happened since the last time, without waiting. After an NVMLError call again."""
        wanted = {_number(handle): gpu for gpu, handle in handles.items() if gpu not in self._unsupported}
        if wanted != self._names:
            self._listen(nvml, {gpu: handles[gpu] for gpu in wanted.values()})
        if self._set is None:
            return
        for _ in range(_AT_ONCE):
            try:
                event = nvml.nvmlEventSetWait_v2(self._set, 0)
            except nvml.NVMLError as error:
                if error.value == nvml.NVML_ERROR_TIMEOUT:
                    return
                self._forget(nvml)
                raise
            gpu = self._names.get(_number(event.device))
            if gpu is not None and event.eventType == nvml.nvmlEventTypeXidCriticalError:
                log.warning("device %s: XID %d", gpu, event.eventData)
                self._counts[gpu][int(event.eventData)] += 1

    def _listen(self, nvml: Any, handles: Mapping[str, Any]) -> None:
        """Make a set of events of these devices; a handle that was lost and found again is another."""
        self._forget(nvml)
        try:
            made = nvml.nvmlEventSetCreate()
        except nvml.NVMLError:
            self._unsupported |= handles.keys()
            return
        names: dict[int, str] = {}
        for gpu, handle in handles.items():
            if not nvml.nvmlDeviceGetSupportedEventTypes(handle) & nvml.nvmlEventTypeXidCriticalError:
                self._unsupported.add(gpu)
                continue
            nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, made)
            names[_number(handle)] = gpu
            self._counts.setdefault(gpu, Counter())
        self._set, self._names = made, names

    def _forget(self, nvml: Any) -> None:
        if self._set is not None:
            made, self._set, self._names = self._set, None, {}
            nvml.nvmlEventSetFree(made)


def _number(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0
