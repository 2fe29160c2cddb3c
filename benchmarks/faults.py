"""What a step of training takes while something is wrong with the monitor.

    python -m benchmarks faults [--steps 400] [--rounds 5]

A small model is trained, watched, with an agent beside it; then something happens to the agent or to the board, and the
next steps are timed. Each fault is timed in turn with the same number of unwatched steps and of steps with a healthy
agent, several times; the figure is the median over the rounds of each round's median step. Results go to
benchmarks/results/faults.json and faults.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import optwatch
from optwatch.board import SUFFIX, find_agent
from optwatch.optim import AdamW

RESULTS = Path(__file__).parent / "results"
WARM = 20


@dataclass
class Scene:
    """What a fault may touch; ``over`` is set when the timed steps are."""

    boards: Path
    agent: subprocess.Popen[bytes]
    over: threading.Event

    @property
    def board(self) -> Path:
        """The board of the only rank."""
        (path,) = self.boards.glob(f"*{SUFFIX}")
        return path


def fuzz(scene: Scene) -> None:
    """Random bytes at random places of the board, every millisecond."""
    size = scene.board.stat().st_size

    def write() -> None:
        with scene.board.open("r+b", buffering=0) as file:
            while not scene.over.wait(0.001):
                file.seek(int.from_bytes(os.urandom(4), "little") % size)
                file.write(os.urandom(64))

    threading.Thread(target=write, daemon=True).start()


def scrape(scene: Scene) -> None:
    """Another process that scrapes ten times a second."""
    url = find_agent(scene.boards)
    program = (
        "import sys, time, urllib.request\n"
        "while True: urllib.request.urlopen(sys.argv[1], timeout=5).read(); time.sleep(0.1)"
    )
    scraper = subprocess.Popen([sys.executable, "-c", program, str(url)], stderr=subprocess.DEVNULL)
    threading.Thread(target=lambda: (scene.over.wait(), scraper.kill(), scraper.wait()), daemon=True).start()


FAULTS: dict[str, Callable[[Scene], object]] = {
    "nothing": lambda _: None,
    "agent killed": lambda scene: scene.agent.kill(),
    "agent stopped": lambda scene: scene.agent.send_signal(signal.SIGSTOP),
    "board truncated": lambda scene: os.truncate(scene.board, 100),
    "board overwritten with noise": lambda scene: scene.board.write_bytes(os.urandom(1 << 16)),
    "board fuzzed": fuzz,
    "directory removed": lambda scene: shutil.rmtree(scene.boards),
    "a scrape every tenth of a second": scrape,
}


def training() -> tuple[AdamW, Callable[[], None]]:
    """An optimizer, and a step of the model it trains: 1.6 million parameters."""
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (torch.nn.Linear(512, 512), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers)
    optimizer = AdamW(model.parameters(), lr=1e-4, state="int8")
    inputs = torch.randn(64, 512)

    def step() -> None:
        loss = (model(inputs) - inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return optimizer, step


def timed(step: Callable[[], None], steps: int) -> list[float]:
    """Milliseconds of each step."""
    found = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        found.append(1e3 * (time.perf_counter() - started))
    return found


def start_agent(boards: Path) -> subprocess.Popen[bytes]:
    """An agent that serves."""
    command = [sys.executable, "-m", "optwatch.agent", "--dir", str(boards), "--port", "0"]
    agent = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not find_agent(boards):
        time.sleep(0.05)
    urllib.request.urlopen(str(find_agent(boards)), timeout=10).read()
    return agent


def under(fault: Callable[[Scene], object] | None, steps: int) -> list[float]:
    """Milliseconds of the steps after a fault; None: nobody watches."""
    optimizer, step = training()
    if fault is None:
        timed(step, WARM)
        return timed(step, steps)
    with tempfile.TemporaryDirectory(prefix="optwatch-benchmark-", ignore_cleanup_errors=True) as place:
        boards = Path(place) / "boards"
        boards.mkdir(mode=0o700)
        agent, over = start_agent(boards), threading.Event()
        try:
            with optwatch.watch(optimizer, directory=str(boards), agent=False):
                timed(step, WARM)
                fault(Scene(boards, agent, over))
                return timed(step, steps)
        finally:
            over.set()
            agent.kill()
            agent.wait()


def measure(steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Of each fault: its median step, and that of unwatched steps in the same rounds."""
    found = {}
    for name, fault in FAULTS.items():
        pairs = [(under(fault, steps), under(None, steps)) for _ in range(rounds)]
        medians = [(statistics.median(ours), statistics.median(other)) for ours, other in pairs]
        found[name] = {
            "ms": statistics.median(ours for ours, _ in medians),
            "unwatched_ms": statistics.median(other for _, other in medians),
            "ratio": statistics.median(ours / other for ours, other in medians),
            "lowest": min(ours / other for ours, other in medians),
            "highest": max(ours / other for ours, other in medians),
            "slowest_ms": max(max(ours) for ours, _ in pairs),
            "slowest_unwatched_ms": max(max(other) for _, other in pairs),
        }
    return found


def report(found: dict[str, dict[str, float]], steps: int, rounds: int) -> str:
    """The table of faults.md."""
    head = (
        f"`python -m benchmarks faults`: {rounds} rounds of {steps} steps, {torch.get_num_threads()} threads,"
        f" {platform.machine()}, torch {torch.__version__}. A round: its median steps, watched over unwatched."
    )
    lines = ["# Steps of training while the monitor is in trouble", "", head, ""]
    lines += ["| what happened | watched | unwatched | ratio | of the rounds | slowest step, unwatched |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, row in found.items():
        lines.append(
            f"| {name} | {row['ms']:.2f} ms | {row['unwatched_ms']:.2f} ms | {row['ratio']:.3f} |"
            f" {row['lowest']:.3f}–{row['highest']:.3f} |"
            f" {row['slowest_ms']:.1f}, {row['slowest_unwatched_ms']:.1f} ms |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=400, help="timed after each fault (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args()
    os.environ["OPTWATCH_STORE"] = "off"
    found = measure(options.steps, options.rounds)
    text = report(found, options.steps, options.rounds)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    settings = {"steps": options.steps, "rounds": options.rounds}
    (RESULTS / "faults.json").write_text(json.dumps({**settings, "faults": found}, indent=1) + "\n")
    (RESULTS / "faults.md").write_text(text)


if __name__ == "__main__":
    main()
