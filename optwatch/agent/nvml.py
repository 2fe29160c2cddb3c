"""GPUs as the driver sees them, identified by UUID. A driver that hangs never holds up the agent."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from optwatch.agent.host import in_host_namespace
from optwatch.agent.watchdog import Watchdog
from optwatch.agent.xid import Xids
from optwatch.exporters.base import Point

log = logging.getLogger("optwatch.agent")

_LIBRARY = "libnvidia-ml.so.1"
_START_SECONDS = 20.0  # without persistence mode the first call loads the driver
_LONGEST_RETRY = 60.0
#: Of every process of a device; whoever shows it knows which of them are ranks.
PROCESS_MEMORY = "optwatch.process.device_memory"

# Reads several values with one call of the driver: nvml module, handle -> (metric, further labels, value) ...
_Reading = tuple[str, dict[str, str], float]
_Probe = Callable[[Any, Any], list[_Reading]]


def _memory(nvml: Any, handle: Any) -> list[_Reading]:
    # As reported: whether `used` contains `reserved` differs between drivers, so nothing is derived.
    memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    return [
        (f"optwatch.device.memory.{name}", {}, float(getattr(memory, name)))
        for name in ("total", "reserved", "free", "used")
    ]


def _utilization(nvml: Any, handle: Any) -> list[_Reading]:
    return [("optwatch.device.utilization.ratio", {}, nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)]


def _power(nvml: Any, handle: Any) -> list[_Reading]:
    return [("optwatch.device.power", {}, nvml.nvmlDeviceGetPowerUsage(handle) / 1e3)]


def _energy(nvml: Any, handle: Any) -> list[_Reading]:
    return [("optwatch.device.energy", {}, nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)]


def _temperature(nvml: Any, handle: Any) -> list[_Reading]:
    celsius = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
    return [("optwatch.device.temperature", {}, float(celsius))]


def _ecc(kind: str) -> _Probe:
    def read(nvml: Any, handle: Any) -> list[_Reading]:
        error = getattr(nvml, f"NVML_MEMORY_ERROR_TYPE_{kind.upper()}")
        count = nvml.nvmlDeviceGetTotalEccErrors(handle, error, nvml.NVML_AGGREGATE_ECC)
        return [("optwatch.device.ecc_errors", {"error": kind}, float(count))]

    return read


_REASONS = {
    "power_cap": "SwPowerCap",
    "thermal": "SwThermalSlowdown",
    "hw_slowdown": "HwSlowdown",
    "hw_thermal": "HwThermalSlowdown",
    "hw_power_brake": "HwPowerBrakeSlowdown",
}


def _throttled(nvml: Any, handle: Any) -> list[_Reading]:
    bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    return [
        (
            "optwatch.device.clock_throttled",
            {"reason": word},
            float(bool(bits & getattr(nvml, f"nvmlClocksEventReason{name}"))),
        )
        for word, name in _REASONS.items()
    ]


def _processes(nvml: Any, handle: Any) -> list[_Reading]:
    found = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return [
        (PROCESS_MEMORY, {"pid": str(one.pid)}, float(one.usedGpuMemory))
        for one in found
        if one.usedGpuMemory is not None  # some drivers know the process, but not its memory
    ]


_PROBES: dict[str, _Probe] = {
    "memory": _memory,
    "utilization": _utilization,
    "power": _power,
    "energy": _energy,
    "temperature": _temperature,
    "ecc_corrected": _ecc("corrected"),
    "ecc_uncorrected": _ecc("uncorrected"),
    "throttled": _throttled,
    "processes": _processes,
}


class _LostError(Exception):
    """The driver no longer has the device."""


@dataclass
class _Device:
    """One GPU or MIG slice."""

    uuid: str
    facts: dict[str, str]
    handle: Any
    watchdog: Watchdog
    delay: float  # until the next try, after a failure
    slice: bool = False  # of MIG
    up: bool | None = None  # None before the first sample
    retry_at: float = 0.0
    unsupported: set[str] = field(default_factory=set)
    readings: list[_Reading] = field(default_factory=list)


class NvmlSampler:
    """Samples all devices every ``interval`` seconds, from a thread of its own.

    Without the driver's library there are no families and one line in the log. ``errors`` counts calls that failed or
    did not return in time.
    """

    def __init__(self, interval: float, limit: float) -> None:
        self.errors = 0
        self._interval, self._limit = interval, limit
        self._nvml: Any = None
        self._devices: tuple[_Device, ...] = ()
        self._xids, self._events = Xids(), Watchdog("nvml-events", limit)
        self._stopping = threading.Event()

    def start(self) -> None:
        """Start sampling; never waits for the driver."""
        threading.Thread(target=self._run, name="optwatch-nvml", daemon=True).start()

    def stop(self) -> None:
        """Ask the thread to end; it is not waited for, since it may be inside the driver."""
        self._stopping.set()

    def points(self) -> Iterator[tuple[str, Point]]:
        """Metric name and point of each value of the newest sample."""
        for device in self._devices:
            if device.up is None:
                continue
            gpu = {"gpu": device.uuid}
            yield "optwatch.device_up", Point(gpu, float(device.up))
            yield "optwatch.device", Point({**gpu, **device.facts}, 1.0)
            for name, labels, value in device.readings:
                if name != PROCESS_MEMORY:
                    yield name, Point({**gpu, **labels}, value)
        yield from self._xids.points()

    def memory_of(self, pid: int) -> Iterator[tuple[str, float]]:
        """Device and bytes that a process holds there.

        The driver numbers processes as the host does: from inside a PID namespace of its own an agent would find
        others under the same numbers, and finds none.
        """
        if not in_host_namespace():
            return
        for device in self._devices:
            for name, labels, value in device.readings:
                if name == PROCESS_MEMORY and labels["pid"] == str(pid):
                    yield device.uuid, value

    def sample_once(self) -> None:
        """One sample of what answers within the limit."""
        try:
            self._devices = Watchdog("nvml", self._limit).call(self._discover)
        except OSError:
            return
        except Exception as error:  # noqa: BLE001 - whatever the driver does, the boards are shown
            log.warning("NVML does not start: %s", error)
            self.errors += 1
        for device in self._devices:
            self._sample(device)

    def _run(self) -> None:
        delay = self._interval
        watchdog = Watchdog("nvml", max(self._limit, _START_SECONDS))
        while not self._devices and not self._stopping.is_set():
            try:
                self._devices = watchdog.call(self._discover)
                if not self._devices:
                    log.info("the NVIDIA driver has no devices: no device metrics")
                    return
            except OSError:
                log.info("%s is not there: no device metrics", _LIBRARY)
                return
            except Exception as error:  # noqa: BLE001 - whatever the driver does, the boards are served
                if delay == self._interval:
                    log.warning("NVML does not start, trying again: %s", error)
                self.errors += 1
                self._stopping.wait(delay)
                delay = min(2 * delay, _LONGEST_RETRY)
        while not self._stopping.is_set():
            for device in self._devices:
                self._sample(device)
            self._hear()
            self._stopping.wait(self._interval)

    def _hear(self) -> None:
        """Take in the errors that the driver has told of meanwhile."""
        handles = {device.uuid: device.handle for device in self._devices if device.up and not device.slice}
        try:
            self._events.call(lambda: self._xids.hear(self._nvml, handles))
        except Exception as error:  # noqa: BLE001 - hung, lost, or whatever else a driver can do to a thread
            log.debug("events: %s", error)
            self.errors += 1

    def _discover(self) -> tuple[_Device, ...]:
        """All devices and MIG slices. OSError without the driver's library."""
        ctypes.CDLL(_LIBRARY)  # before pynvml, which takes 5 MB that a node without a GPU need not pay
        import pynvml  # noqa: PLC0415 - see above

        pynvml.nvmlInit()
        self._nvml = pynvml
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        devices = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                for name, one in ((str(index), handle), *_slices(pynvml, index, handle)):
                    facts = {"index": name, "model": _text(pynvml.nvmlDeviceGetName(one)), "driver": driver}
                    uuid = _text(pynvml.nvmlDeviceGetUUID(one))
                    watchdog = Watchdog(f"nvml-{name}", self._limit)
                    devices.append(_Device(uuid, facts, one, watchdog, self._interval, ":" in name))
            except pynvml.NVMLError as error:  # one lost device must not hide the others
                self.errors += 1
                log.warning("device %d cannot be opened: %s", index, error)
        return tuple(devices)

    def _sample(self, device: _Device) -> None:
        if time.monotonic() < device.retry_at:
            return
        try:
            device.readings = device.watchdog.call(lambda: self._read(device))
        except Exception as error:  # noqa: BLE001 - hung, lost, or whatever else a driver can do to a thread
            if device.up is not False:
                log.warning("device %s: %s", device.uuid, error)
            self.errors += 1
            device.up, device.readings = False, []
            device.retry_at = time.monotonic() + device.delay
            device.delay = min(2 * device.delay, _LONGEST_RETRY)
            return
        device.up, device.delay = True, self._interval

    def _read(self, device: _Device) -> list[_Reading]:
        nvml = self._nvml
        if device.up is False:
            device.handle = self._again(device)
        readings: list[_Reading] = []
        for name, probe in _PROBES.items():
            if name in device.unsupported:
                continue
            try:
                readings += probe(nvml, device.handle)
            except AttributeError:  # an older nvidia-ml-py does not know this call
                device.unsupported.add(name)
            except nvml.NVMLError as error:
                self._failed(device, name, error)
        return readings

    def _again(self, device: _Device) -> Any:
        """A new handle: the old one stays lost after the device came back."""
        try:
            return self._nvml.nvmlDeviceGetHandleByUUID(device.uuid.encode())
        except self._nvml.NVMLError as error:
            raise _LostError(str(error)) from error

    def _failed(self, device: _Device, name: str, error: Any) -> None:
        """Not supported: absent from now on. Lost: raises _LostError. Else absent this time, and counted."""
        nvml = self._nvml
        if error.value in {
            nvml.NVML_ERROR_NOT_SUPPORTED,
            nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            nvml.NVML_ERROR_NO_PERMISSION,
            nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        }:
            device.unsupported.add(name)
        elif error.value in {
            nvml.NVML_ERROR_GPU_IS_LOST,
            nvml.NVML_ERROR_GPU_NOT_FOUND,
            nvml.NVML_ERROR_RESET_REQUIRED,
            nvml.NVML_ERROR_UNINITIALIZED,
        }:
            raise _LostError(str(error))
        else:
            self.errors += 1


def _slices(nvml: Any, index: int, device: Any) -> Iterator[tuple[str, Any]]:
    """Name and handle of each MIG slice; none where MIG is off or unknown."""
    try:
        if not nvml.nvmlDeviceGetMigMode(device)[0]:
            return
        count = nvml.nvmlDeviceGetMaxMigDeviceCount(device)
    except nvml.NVMLError:
        return
    for position in range(count):
        try:
            yield f"{index}:{position}", nvml.nvmlDeviceGetMigDeviceHandleByIndex(device, position)
        except nvml.NVMLError:
            continue  # numbers of slices have gaps


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
