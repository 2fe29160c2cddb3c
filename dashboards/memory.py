"""The dashboard "optwatch memory": bytes of one run, on hosts and devices, and where they lead."""

from __future__ import annotations

from dashboards.board import Board
from dashboards.panels import Panel, Query, Row
from dashboards.queries import OPTIMIZER, RUN, devices, latest, node, rate, series, total

NO_GPU = "no GPU"


def rest(of: str, device: str) -> str:
    """The sum of a metric over ranks, less the parameters, gradients and state on devices of this kind."""
    held = (
        series(name, f'{OPTIMIZER}, device=~"{device}"')
        for name in ("parameter", "gradient", "optimizer.state")
    )
    return f"sum ({series(of, RUN)})" + "".join(f" - (sum ({one}) or vector(0))" for one in held)


STATE = Row(
    "Optimizer state",
    (
        Panel(
            "State found against asked for",
            "bytes",
            "Good: one line hides the other; else, from the first step after a resume that changed the format on,"
            " load the checkpoint with optimizer.load_state_dict().",
            [
                total("optimizer.state", "slot", legend="{{slot}} found"),
                total("optimizer.state_expected", "slot", legend="{{slot}} asked for"),
            ],
            minimum=0,
        ),
        Panel(
            "State by slot and dtype",
            "bytes",
            "Bytes of state found, over the ranks chosen. Good: flat from the first step on, in the dtypes you"
            " asked for; else a new dtype is a conversion: see StateBytesUnexpected.",
            [total("optimizer.state", "slot", "dtype", "device")],
            stacked=True,
            minimum=0,
        ),
        Panel(
            "State a parameter by rank",
            "suffix: B",
            "Bytes of optimizer state a parameter. Good: the same on all ranks; else state depends on the sharding:"
            " look for pieces too small for the format.",
            [
                Query(
                    f"sum by (optimizer, rank) ({series('optimizer.state', OPTIMIZER)})"
                    f" / sum by (optimizer, rank) ({series('parameters', OPTIMIZER)})",
                    "{{optimizer}} rank {{rank}}",
                )
            ],
            minimum=0,
        ),
    ),
)

HOLDINGS = Row(
    "What the run holds",
    (
        Panel(
            "Parameters, gradients and state",
            "bytes",
            "Over the ranks chosen. Good: flat; else, where gradients stay, call zero_grad(set_to_none=True), or"
            " release them.",
            [
                total("parameter", legend="parameters"),
                total("gradient", legend="gradients"),
                total("optimizer.state", legend="state"),
            ],
            stacked=True,
            minimum=0,
            width=12,
        ),
        Panel(
            "Parameters",
            "short",
            "Elements the optimizers hold, over the ranks chosen. Good: constant; else layers were unfrozen or"
            " frozen: did you mean that?",
            [total("parameters", "optimizer", "dtype", "device")],
            minimum=0,
            width=12,
        ),
        Panel(
            "Everything else",
            "bytes",
            "Memory in use that is neither parameters, gradients nor state of optimizers chosen: on GPUs what"
            " lives on from step to step, on hosts also Python and its libraries. Good: flat; else someone keeps"
            " what grows: see MemoryLeak.",
            [
                Query(rest("allocator.allocated", "cuda.*"), "on GPUs"),
                Query(rest("host_memory.rss", "cpu"), "host"),
                total("pinned_memory", legend="host, pinned for copies", matchers=RUN),
            ],
            minimum=0,
            width=24,
        ),
        Panel(
            "Resident host memory",
            "bytes",
            "Resident memory of each training process, and its peak. Good: flat after the first minutes; else, in"
            " a steady rise, it is a leak: see MemoryLeak.",
            [
                Query(f"max by (rank) ({series('host_memory.rss', RUN)})", "rank {{rank}}"),
                Query(f"max ({series('host_memory.peak', RUN)})", "peak of all ranks"),
            ],
            minimum=0,
            width=12,
        ),
        Panel(
            "Resident host memory in an hour",
            "bytes",
            "A straight line through the last 30 minutes, drawn on for an hour; it means nothing in a run's first"
            " ones. Good: where it is now; else, above the memory of the host, plan a restart or find the leak.",
            [
                Query(
                    f"max by (rank) (predict_linear({series('host_memory.rss', RUN)}[30m], 3600))",
                    "rank {{rank}}",
                )
            ],
            minimum=0,
            width=12,
        ),
    ),
)

DEVICE = Row(
    "Device memory",
    (
        Panel(
            "Device memory",
            "bytes",
            "As the driver reports it; whether used includes reserved differs between drivers. Good: used below"
            " total; else see MemoryHeadroomLow.",
            [
                devices("device.memory.used", "used {{gpu}}"),
                devices("device.memory.reserved", "reserved {{gpu}}"),
                devices("device.memory.total", "total {{gpu}}"),
                latest("process.device_memory", "rank {{rank}} {{gpu}}"),
            ],
            minimum=0,
            no_value=NO_GPU,
        ),
        Panel(
            "Device memory free",
            "percentunit",
            "Good: above 5 %; else a longer batch may run out: use a low-bit state, or release_gradients().",
            [
                Query(
                    f"({node('device.memory.free')}) / ({node('device.memory.total')})",
                    "{{gpu}}",
                )
            ],
            minimum=0,
            steps=(("red", None), ("orange", 0.05), ("green", 0.1)),
            no_value=NO_GPU,
        ),
        Panel(
            "Device memory free in an hour",
            "bytes",
            "A straight line through the last 30 minutes, drawn on for an hour. Good: above 0; else see MemoryLeak.",
            [
                Query(
                    f"predict_linear({series('device.memory.free')}[30m], 3600)"
                    f" and on (instance) {series('rank_up', RUN)}",
                    "{{gpu}}",
                )
            ],
            no_value=NO_GPU,
        ),
        Panel(
            "torch's allocator",
            "bytes",
            "Good: reserved not far above allocated, peaks below the device's total; else look at the"
            " fragmentation beside.",
            [
                latest("allocator.allocated", "allocated, rank {{rank}}"),
                latest("allocator.reserved", "reserved, rank {{rank}}"),
                latest("allocator.active", "active, rank {{rank}}"),
                latest("allocator.allocated_peak", "allocated, peak, rank {{rank}}"),
                latest("allocator.reserved_peak", "reserved, peak, rank {{rank}}"),
            ],
            minimum=0,
            no_value=NO_GPU,
        ),
        Panel(
            "Fragmentation",
            "percentunit",
            "Inactive split memory of the reserved. Good: below 20 %; else try expandable_segments:True in"
            " PYTORCH_CUDA_ALLOC_CONF.",
            [
                Query(
                    f"sum by (rank) ({series('allocator.inactive_split', RUN)})"
                    f" / sum by (rank) ({series('allocator.reserved', RUN)})",
                    "rank {{rank}}",
                )
            ],
            minimum=0,
            no_value=NO_GPU,
        ),
        Panel(
            "Allocator retries and failures a second",
            "suffix: /s",
            "Allocations that had to flush the cache first, and those that failed. Good: none; else leave more"
            " memory free, for retries are slow, and failures come next: see AllocatorRetries.",
            [
                rate("allocator.retries", "rank", legend="retries, rank {{rank}}"),
                rate("allocator.ooms", "rank", legend="failures, rank {{rank}}"),
            ],
            minimum=0,
            no_value=NO_GPU,
        ),
    ),
)

BOARD = Board(
    "memory",
    "Bytes of one training run: optimizer state against what was asked for, hosts, devices, and where they lead.",
    (STATE, HOLDINGS, DEVICE),
    shown=("job", "run", "optimizer", "rank"),
)
