"""Rows of the optimizer dashboard: memory, devices, and the monitor itself."""

from __future__ import annotations

from dashboards.panels import Panel, Query, Row
from dashboards.queries import GREEN_ABOVE_ZERO_RED, OPTIMIZER, RUN, latest, node, rate, series, total, worst

MEMORY = Row(
    "Memory",
    (
        Panel(
            "What the optimizer holds",
            "bytes",
            "Parameters, gradients and optimizer state over all ranks. Good: flat.",
            [
                total("parameter", legend="parameters"),
                total("gradient", legend="gradients"),
                total("optimizer.state", legend="state"),
            ],
            stacked=True,
            minimum=0,
        ),
        Panel(
            "Parameters",
            "short",
            "Elements the optimizers hold, over all ranks. Good: constant.",
            [total("parameters", "optimizer", "dtype", "device")],
            minimum=0,
        ),
        Panel(
            "Resident host memory",
            "bytes",
            "Resident memory of each training process. Good: flat after the first minutes; a steady rise is a leak.",
            [worst("host_memory.rss", "rank", matchers=RUN)],
            minimum=0,
        ),
        Panel(
            "Device memory",
            "bytes",
            "As the driver reports it; whether used includes reserved differs between drivers. Good: used below total.",
            [
                Query(node("device.memory.used"), "used {{gpu}}"),
                Query(node("device.memory.reserved"), "reserved {{gpu}}"),
                Query(node("device.memory.total"), "total {{gpu}}"),
            ],
            minimum=0,
            no_value="no GPU",
        ),
        Panel(
            "torch's allocator",
            "bytes",
            "Good: reserved not far above allocated, and inactive split memory, which is fragmentation, small.",
            [
                latest("allocator.allocated", "allocated {{rank}}"),
                latest("allocator.reserved", "reserved {{rank}}"),
                latest("allocator.active", "active {{rank}}"),
                latest("allocator.inactive_split", "inactive split {{rank}}"),
                latest("allocator.allocated_peak", "allocated, peak {{rank}}"),
                latest("allocator.reserved_peak", "reserved, peak {{rank}}"),
            ],
            minimum=0,
            no_value="no GPU",
        ),
        Panel(
            "Allocator retries and failures a second",
            "suffix: /s",
            "Allocations that had to flush the cache first, and those that failed. Good: none; retries are slow.",
            [
                rate("allocator.retries", "rank", legend="retries {{rank}}"),
                rate("allocator.ooms", "rank", legend="failures {{rank}}"),
            ],
            minimum=0,
            no_value="no GPU",
        ),
        Panel(
            "Device utilisation",
            "percentunit",
            "Part of the time in which a kernel ran. Good: near 100 %; dips are data loading or communication.",
            [Query(node("device.utilization.ratio"), "{{gpu}}")],
            minimum=0,
            no_value="no GPU",
        ),
        Panel(
            "Device power",
            "watt",
            "Power drawn, and the mean from the energy counter. Good: near the limit while training.",
            [
                Query(node("device.power"), "{{gpu}}"),
                Query(node("device.energy", rate=True), "{{gpu}} mean"),
            ],
            minimum=0,
            no_value="no GPU",
        ),
        Panel(
            "Device temperature",
            "celsius",
            "Good: steady, and no throttling beside it.",
            [Query(node("device.temperature"), "{{gpu}}")],
            no_value="no GPU",
        ),
        Panel(
            "Clocks held down",
            "none",
            "1 while the driver holds the clock down for the reason. Good: 0, or the power limit only.",
            [Query(node("device.clock_throttled"), "{{gpu}} {{reason}}")],
            minimum=0,
            no_value="no GPU",
        ),
        Panel(
            "Device faults",
            "short",
            "Whether the device answers, ECC errors of its life. Good: up 1, none uncorrected.",
            [
                Query(node("device_up"), "up {{gpu}}"),
                Query(node("device.ecc_errors"), "ECC {{error}} {{gpu}}"),
            ],
            minimum=0,
            no_value="no GPU",
        ),
    ),
)

MONITOR = Row(
    "The monitor itself",
    (
        Panel(
            "Overhead of watching",
            "percentunit",
            "Time that watching takes from the training process. Good: below 0.1 %.",
            [rate("overhead", "rank", legend="rank {{rank}}")],
            minimum=0,
        ),
        Panel(
            "Age of the full statistics",
            "s",
            "How old the newest full statistics were at the newest step. Good: no more than `every` steps.",
            [
                Query(
                    f"max by (rank) ({series('last_step_timestamp', RUN)})"
                    f" - max by (rank) ({series('last_sample_timestamp', RUN)})",
                    "rank {{rank}}",
                )
            ],
            minimum=0,
        ),
        Panel(
            "Dropped, skipped, failed",
            "short",
            "Samples overwritten before they were read, series over the cap, boards that could not be read, driver"
            " calls that failed; all since the agent started. Good: 0.",
            [
                total("samples_dropped", matchers=RUN, legend="samples"),
                total("series_dropped", matchers=RUN, legend="series"),
                Query(f"sum by (reason) ({node('boards_skipped')})", "boards, {{reason}}"),
                Query(f"sum ({node('nvml_errors')})", "driver calls"),
            ],
            steps=GREEN_ABOVE_ZERO_RED,
            minimum=0,
        ),
        Panel(
            "Time to render a scrape",
            "s",
            "Good: below 50 ms.",
            [Query(f"max ({node('scrape_duration')})", "scrape")],
            minimum=0,
        ),
        Panel(
            "Ranks and hosts",
            "none",
            "Facts about each rank. Good: every rank of the world is listed once.",
            [Query(series("run", RUN), "")],
            kind="table",
            width=16,
        ),
        Panel(
            "Optimizers",
            "none",
            "What was asked for. Good: the codec you meant, on a compiled backend (not reference).",
            [Query(series("optimizer", OPTIMIZER), "")],
            kind="table",
            width=12,
        ),
        Panel(
            "Agents",
            "none",
            "Version of each agent. Good: the same on all nodes.",
            [Query(node("build"), "")],
            kind="table",
            width=6,
        ),
        Panel(
            "Devices",
            "none",
            "UUID, model and driver of each GPU. Good: the same model and driver everywhere.",
            [Query(node("device"), "")],
            kind="table",
            width=6,
            no_value="no GPU",
        ),
    ),
)
