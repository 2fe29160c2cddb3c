"""Device metrics against a real shared library with the driver's symbols, loaded by the real pynvml."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent_process import Scrape, agent, eventually, scrape
from board_samples import Feed, schema
from nvml_library import Driver, build_nvml
from optwatch.agent import host
from optwatch.agent.host import in_host_namespace
from optwatch.agent.nvml import PROCESS_MEMORY, NvmlSampler, _Device
from optwatch.agent.watchdog import Watchdog
from optwatch.board import BoardWriter

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The folder with the library, built from C."""
    return build_nvml(tmp_path_factory.mktemp("nvml"))


class Watched(Driver):
    """The driver, and the agent that talks to it."""

    url = ""

    def page(self) -> Scrape:
        """A scrape of the agent."""
        return scrape(self.url)


@contextmanager
def driven(library: Path, directory: Path, *orders: str) -> Iterator[Watched]:
    """An agent on a driver with these orders."""
    driver = Watched(library, directory)
    driver.order(*orders)
    options = ("--device-interval", "0.1", "--device-limit", "0.5")
    with agent(directory, *options, environment=driver.environment) as (url, _):
        driver.url = url
        yield driver


def seen(driver: Watched, name: str, value: float, **labels: str) -> None:
    """Wait for a series to have a value."""

    def check() -> None:
        assert driver.page().all(name, **labels) == [value]

    eventually(check)


def test_values_and_units(library: Path, tmp_path: Path) -> None:
    """Every reading in its base unit, under the device's UUID; memory exactly as reported."""
    with driven(library, tmp_path, "devices 2") as driver:
        seen(driver, "optwatch_device_up", 1, gpu="GPU-1")
        page = driver.page()
        for index in (0, 1):
            gpu = {"gpu": f"GPU-{index}"}
            values = {
                "memory_total_bytes": 8e10, "memory_reserved_bytes": 5e8, "memory_free_bytes": 6e10,
                "memory_used_bytes": 2e10 + index, "utilization_ratio": 0.37, "power_watts": 312.5,
                "energy_joules_total": 123456.789, "temperature_celsius": 61,
            }  # fmt: skip
            assert {name: page.one(f"optwatch_device_{name}", **gpu) for name in values} == values
            assert page.one("optwatch_device_ecc_errors_total", error="corrected", **gpu) == 5
            assert page.one("optwatch_device_ecc_errors_total", error="uncorrected", **gpu) == 1
            assert page.one("optwatch_device_clock_throttled", reason="power_cap", **gpu) == 1
            assert page.one("optwatch_device_clock_throttled", reason="thermal", **gpu) == 0
            assert (
                page.one("optwatch_device_info", model="Test GPU", driver="999.42", index=str(index), **gpu)
                == 1
            )
        assert page.one("optwatch_nvml_errors_total") == 0


@pytest.mark.parametrize(
    ("reading", "family"),
    [
        ("memory", "optwatch_device_memory_used_bytes"),
        ("utilization", "optwatch_device_utilization_ratio"),
        ("power", "optwatch_device_power_watts"),
        ("energy", "optwatch_device_energy_joules_total"),
        ("temperature", "optwatch_device_temperature_celsius"),
        ("ecc", "optwatch_device_ecc_errors_total"),
        ("throttled", "optwatch_device_clock_throttled"),
    ],
)
def test_unsupported_is_absent(library: Path, tmp_path: Path, reading: str, family: str) -> None:
    """What the device cannot tell has no family, which is no error."""
    with driven(library, tmp_path, f"unsupported {reading}") as driver:
        seen(driver, "optwatch_device_up", 1)
        page = driver.page()
        assert page.all(family) == []
        assert len([s for s in page.samples if s.name.startswith("optwatch_device_")]) > 6
        assert page.one("optwatch_nvml_errors_total") == 0


def test_failing_call_is_counted_and_comes_back(library: Path, tmp_path: Path) -> None:
    """A reading that fails is absent for as long as it fails, and every failure is counted."""
    with driven(library, tmp_path) as driver:
        seen(driver, "optwatch_device_power_watts", 312.5)
        driver.order("failing power")

        def absent() -> None:
            page = driver.page()
            assert page.all("optwatch_device_power_watts") == []
            assert page.one("optwatch_device_temperature_celsius") == 61
            assert page.one("optwatch_nvml_errors_total") >= 2

        eventually(absent)
        driver.order()
        seen(driver, "optwatch_device_power_watts", 312.5)


def test_lost_device(library: Path, tmp_path: Path) -> None:
    """device_up 0 and no samples of it, the other goes on; when it is back, so are its values."""
    with driven(library, tmp_path, "devices 2") as driver:
        seen(driver, "optwatch_device_up", 1, gpu="GPU-1")
        driver.order("devices 2", "lost 1")
        seen(driver, "optwatch_device_up", 0, gpu="GPU-1")
        page = driver.page()
        assert page.all("optwatch_device_temperature_celsius") == [61]
        assert page.one("optwatch_device_temperature_celsius", gpu="GPU-0") == 61
        assert page.one("optwatch_nvml_errors_total") >= 1
        driver.order("devices 2")
        seen(driver, "optwatch_device_temperature_celsius", 61, gpu="GPU-1")


def test_hung_device_holds_up_nothing(library: Path, tmp_path: Path) -> None:
    """A call that never returns: the device is down, everything else is served, and it recovers."""
    with driven(library, tmp_path, "devices 2") as driver:
        seen(driver, "optwatch_device_up", 1, gpu="GPU-0")
        driver.order("devices 2", "hung 0")
        seen(driver, "optwatch_device_up", 0, gpu="GPU-0")
        page = driver.page()
        assert page.one("optwatch_device_up", gpu="GPU-1") == 1
        assert page.one("optwatch_device_power_watts", gpu="GPU-1") == 312.5
        assert page.all("optwatch_device_power_watts", gpu="GPU-0") == []
        driver.order("devices 2")
        seen(driver, "optwatch_device_up", 1, gpu="GPU-0")


def test_hung_start(library: Path, tmp_path: Path) -> None:
    """A driver that hangs on its first call never delays the agent; its devices come when it lets go."""
    with driven(library, tmp_path, "hung_init") as driver:
        page = driver.page()
        assert page.one("optwatch_build_info") == 1
        assert page.all("optwatch_device_up") == []
        driver.order()
        seen(driver, "optwatch_device_up", 1)


def test_hung_driver_does_not_keep_the_agent(library: Path, tmp_path: Path) -> None:
    """A thread inside the driver cannot be ended; the agent leaves all the same when its time has come."""
    (tmp_path / "driver").write_text("hung_init\n")
    environment = {"LD_LIBRARY_PATH": str(library), "FAKE_NVML": str(tmp_path / "driver")}
    with agent(tmp_path, "--exit-when-idle", "0.3", environment=environment) as (_, process):
        assert process.wait(20) == 0


def test_driver_that_is_not_loaded_yet(library: Path, tmp_path: Path) -> None:
    """The library without its kernel module: counted, tried again."""
    with driven(library, tmp_path, "not_loaded") as driver:

        def counted() -> None:
            assert driver.page().one("optwatch_nvml_errors_total") >= 1

        eventually(counted)
        assert driver.page().all("optwatch_device_up") == []
        driver.order()
        seen(driver, "optwatch_device_up", 1)


def test_mig_slices_have_their_own_uuid(library: Path, tmp_path: Path) -> None:
    """Slices are devices of their own; what a slice cannot tell is absent for it."""
    with driven(library, tmp_path, "mig 0") as driver:
        seen(driver, "optwatch_device_up", 1, gpu="MIG-0-2")
        page = driver.page()
        assert page.one("optwatch_device_memory_used_bytes", gpu="MIG-0-0") == 2e10
        assert page.all("optwatch_device_power_watts", gpu="MIG-0-0") == []
        assert page.one("optwatch_device_power_watts", gpu="GPU-0") == 312.5
        assert page.one("optwatch_device_info", gpu="MIG-0-2", index="0:2") == 1


def test_memory_of_the_ranks_process(library: Path, tmp_path: Path) -> None:
    """By the rank's process id; other processes, and memory that the driver does not know, have no series."""
    Feed(BoardWriter.create(tmp_path, schema())).publish()
    pid = os.getpid()
    orders = (
        "devices 3",
        f"process 0 {pid} 1234",
        "process 0 1 99",
        f"process 1 {pid} 77",
        f"process 2 {pid} -",
    )
    with driven(library, tmp_path, *orders) as driver:
        expected = [("GPU-0", 1234.0), ("GPU-1", 77.0)] if in_host_namespace() else []
        seen(driver, "optwatch_device_up", 1, gpu="GPU-2")
        found = [
            (s.labels["gpu"], s.value, s.labels["rank"])
            for s in driver.page().samples
            if s.name == "optwatch_process_device_memory_bytes"
        ]
        assert found == [(*one, "0") for one in expected]


def test_process_ids_of_another_namespace_are_not_guessed(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that mean other processes here make no series."""
    sampler = NvmlSampler(1.0, 1.0)
    readings = [(PROCESS_MEMORY, {"pid": "7"}, 5.0)]
    sampler._devices = (_Device("GPU-0", {}, None, Watchdog("", 1.0), 1.0, readings=readings),)
    own = Path("/proc/self/ns/pid").stat().st_ino
    for inode, expected in ((own, [("GPU-0", 5.0)]), (own + 1, [])):
        monkeypatch.setattr(host, "_HOST_NAMESPACE", inode)
        assert list(sampler.memory_of(7)) == expected


def test_xid_errors(library: Path, tmp_path: Path) -> None:
    """Counted from zero, their numbers shown, each told once."""
    with driven(library, tmp_path, "devices 2") as driver:
        seen(driver, "optwatch_device_xid_errors_total", 0, gpu="GPU-0")
        driver.order("devices 2", "xid 1 79", "xid 1 31", "xid 1 31")
        seen(driver, "optwatch_device_xid_errors_total", 3, gpu="GPU-1")
        time.sleep(0.3)  # several samples
        page = driver.page()
        assert page.one("optwatch_device_xid_errors_total", gpu="GPU-1") == 3
        assert page.one("optwatch_device_xid_errors_total", gpu="GPU-0") == 0
        numbers = [s.labels["xid"] for s in page.samples if s.name == "optwatch_device_xid_info"]
        assert numbers == ["31", "79"]
        assert page.one("optwatch_nvml_errors_total") == 0
        driver.order("devices 2", "lost 1", "xid 1 79", "xid 1 31", "xid 1 31")
        seen(driver, "optwatch_device_up", 0, gpu="GPU-1")
        driver.order("devices 2", "xid 1 79", "xid 1 31", "xid 1 31", "xid 1 48")
        seen(driver, "optwatch_device_xid_errors_total", 4, gpu="GPU-1")  # again after it came back


@pytest.mark.parametrize("order", ["hung_events", "lost_events"])
def test_events_that_cannot_be_waited_for(library: Path, tmp_path: Path, order: str) -> None:
    """Everything else is sampled; what happened is told when the driver answers again."""
    with driven(library, tmp_path) as driver:
        seen(driver, "optwatch_device_xid_errors_total", 0)
        driver.order(order, "xid 0 79")

        def counted() -> None:
            assert driver.page().one("optwatch_nvml_errors_total") >= 2

        eventually(counted)
        assert driver.page().one("optwatch_device_power_watts") == 312.5
        driver.order("xid 0 79")
        seen(driver, "optwatch_device_xid_errors_total", 1)


def test_devices_without_events_have_no_counter(library: Path, tmp_path: Path) -> None:
    """Absent, and no error."""
    with driven(library, tmp_path, "unsupported events") as driver:
        seen(driver, "optwatch_device_power_watts", 312.5)
        assert driver.page().all("optwatch_device_xid_errors_total") == []
        assert driver.page().one("optwatch_nvml_errors_total") == 0


def test_no_driver_is_one_line(tmp_path: Path) -> None:
    """Without the library there are no families, no errors, and one line in the log."""
    with agent(tmp_path, "--device-interval", "0.05", environment={"LD_LIBRARY_PATH": ""}) as (url, _):
        time.sleep(0.5)
        page = scrape(url)
        assert [s for s in page.samples if s.name.startswith("optwatch_device")] == []
        assert page.one("optwatch_nvml_errors_total") == 0
    log = (tmp_path / "agent-test.log").read_text()
    assert log.count("no device metrics") == 1
