"""A node in miniature: a program that trains, the agent that watches it, GPUs if asked for, a real Prometheus.

The GPUs are those of the stand-in for the driver's library (nvml_library), which the agent loads with the real pynvml.
What torch's CUDA allocator tells is absent all the same: no tensor lies on these devices.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from agent_process import agent
from board_samples import environment
from nvml_library import Driver, build_nvml
from prometheus_server import PrometheusServer

RULES = Path(__file__).parents[1] / "deploy" / "prometheus" / "optwatch.rules.yml"


@dataclass
class Node:
    """What runs on it; ``boards`` also holds the programs' logs."""

    boards: Path
    metrics_url: str
    prometheus: PrometheusServer
    training: subprocess.Popen[bytes]
    driver: Driver | None


def demo(seconds: float, *options: str) -> list[str]:
    """The command of a real training run of that many seconds, on the CPU."""
    return [sys.executable, "-m", "optwatch", "demo", "--device=cpu", f"--seconds={seconds:g}", *options]


@contextmanager
def node(
    root: Path, command: Sequence[str | Path], *options: str, gpus: int = 0, rules: Sequence[Path] = (RULES,)
) -> Iterator[Node]:
    """The node, in ``root``, once the training that ``command`` starts has taken its first steps; ends all of it.

    ``options`` are the agent's. The training holds 3 GB of the first GPU, if there are any, in the eyes of the driver.
    """
    boards = root / "boards"
    boards.mkdir(mode=0o700, parents=True)
    driver = Driver(build_nvml(root), root) if gpus else None
    if driver:
        driver.order(f"devices {gpus}")
    with (
        agent(boards, *_QUICK, *options, environment=driver.environment if driver else {}) as (url, _),
        PrometheusServer(root / "prometheus", url, rules) as prometheus,
        (boards / "training.log").open("wb") as log,
    ):
        # One thread: the others' would spin while they wait, on cores that have other things to do.
        given = {**environment(), "OPTWATCH_DIR": str(boards), "OMP_NUM_THREADS": "1"}
        training = subprocess.Popen(command, stdout=log, stderr=log, env=given, start_new_session=True)
        try:
            if driver:
                driver.order(f"devices {gpus}", f"process 0 {training.pid} 3000000000")
            prometheus.wait_for("optwatch_steps_total > 3", 180)
            yield Node(boards, url, prometheus, training, driver)
        finally:
            _end(training)


#: Devices are sampled as often as Prometheus scrapes here.
_QUICK = ("--device-interval", "1", "--device-limit", "0.5")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and whatever it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()
