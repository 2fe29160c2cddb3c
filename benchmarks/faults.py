"""What a step of training takes while something is wrong with the monitor.

    python -m benchmarks faults [--steps 120] [--rounds 7]

One process trains the same small model four times, a step of each in turn, so that whatever else the machine does
meets all of them: unwatched, watched by a healthy agent (twice, to know the noise), and watched while something happens
to its agent, its board or its file system. A round makes all four anew; its figure is a ratio of median steps, that of
a fault the median over the rounds. What a fault costs is its ratio to the healthy run beside it; the noise is what the
second healthy run shows against the first in the same way. Weights are compared bit by bit. Results go to
benchmarks/results/faults.json and faults.md.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

import optwatch
from benchmarks.faults_report import Round, Times, band, report, summary
from optwatch.board import SUFFIX, find_agent
from optwatch.hooks import session
from optwatch.hooks.launch import wait_for_agent
from optwatch.hooks.session import Watch
from optwatch.optim import AdamW

RESULTS = Path(__file__).parent / "results"
WARM = 10
#: Seconds between looks whether the agent still runs: a tenth of watch()'s own, so that each round sees several.
AGENT_CHECK = 0.5


@dataclass
class Scene:
    """What a fault may touch; ``cleanup`` runs when the round is over."""

    boards: Path
    agent: subprocess.Popen[bytes]
    watch: Watch
    cleanup: ExitStack

    @property
    def board(self) -> Path:
        """The board of the only rank."""
        (path,) = self.boards.glob(f"*{SUFFIX}")
        return path

    def beside(self, program: str, *arguments: object) -> None:
        """Run a Python program in a process of its own until the round is over."""
        command = [sys.executable, "-c", program, *map(str, arguments)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self.cleanup.callback(process.wait)
        self.cleanup.callback(process.kill)


Strike: TypeAlias = Callable[[Scene], object]
#: Makes a context that a step of the troubled run is taken in.
Around: TypeAlias = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Fault:
    """What happens before the timed steps, and around each of the troubled run."""

    strike: Strike = lambda _: None
    around: Around = contextlib.nullcontext
    small: bool = False  # whether the boards lie in a small file system of their own


def fuzz(scene: Scene) -> None:
    """Random bytes at random places of the board, every millisecond."""
    program = """if True:
        import os, sys, time
        with open(sys.argv[1], "r+b", buffering=0) as file:
            while True:
                file.seek(int.from_bytes(os.urandom(4), "little") % os.fstat(file.fileno()).st_size)
                file.write(os.urandom(64))
                time.sleep(0.001)"""
    scene.beside(program, scene.board)


def scrape(scene: Scene) -> None:
    """Another process that scrapes ten times a second."""
    program = """if True:
        import sys, time, urllib.request
        while True:
            urllib.request.urlopen(sys.argv[1], timeout=5).read()
            time.sleep(0.1)"""
    scene.beside(program, find_agent(scene.boards))


def remove_directory(scene: Scene) -> None:
    """Everything of it, and what a process makes there meanwhile."""
    shutil.rmtree(scene.boards)


def remove_and_log(scene: Scene) -> None:
    """The next step opens a new generation of the board, which has no place to be."""
    remove_directory(scene)
    scene.watch.log(accuracy=0.5)


def kill_for_good(scene: Scene) -> None:
    """No other agent can start, either."""
    scene.agent.kill()
    scene.agent.wait()
    (scene.boards / "agent.json").unlink(missing_ok=True)
    (scene.boards / "agent.json").mkdir()


def fill(scene: Scene) -> None:
    """Not a byte is left where the board lies, and the next step opens a new generation of it."""
    with contextlib.suppress(OSError), (scene.boards / "ballast").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    scene.watch.log(accuracy=0.5)


def fork(_: Scene) -> None:
    """A child that lives as long as a worker of a data loader."""
    if not (child := os.fork()):
        time.sleep(1)
        os._exit(0)
    _children.append(child)


_children: list[int] = []


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """Every write to a board is refused."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def turned(hours: float) -> Iterator[None]:
    """The clock of the process is set; the next step of this run sees it so, the others do not."""
    real = time.time
    time.time = lambda: real() + 3600 * hours
    try:
        yield
    finally:
        time.time = real


FAULTS: dict[str, Fault] = {
    "nothing": Fault(),
    "agent killed, another starts": Fault(lambda scene: scene.agent.kill()),
    "agent killed, none can start": Fault(kill_for_good),
    "agent stopped": Fault(lambda scene: scene.agent.send_signal(signal.SIGSTOP)),
    "board truncated": Fault(lambda scene: os.truncate(scene.board, 100)),
    "board overwritten with noise": Fault(lambda scene: scene.board.write_bytes(os.urandom(1 << 16))),
    "board fuzzed": Fault(fuzz),
    "board removed": Fault(lambda scene: scene.board.unlink()),
    "directory removed": Fault(remove_directory),
    "directory removed, new generation": Fault(remove_and_log),
    "every write refused": Fault(around=no_room),
    "file system full, new generation": Fault(fill, small=True),
    "clock forward and back each step": Fault(around=lambda: turned(24)),
    "clock back and forward each step": Fault(around=lambda: turned(-24)),
    "fork after watch": Fault(fork),
    "a scrape every tenth of a second": Fault(scrape),
}


class Training:
    """A model of 1.6 million parameters, and what steps of it took."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [layer for _ in range(6) for layer in (torch.nn.Linear(512, 512), torch.nn.Tanh())]
        self._model = torch.nn.Sequential(*layers)
        self._inputs = torch.randn(16, 512)
        self.optimizer = AdamW(self._model.parameters(), lr=1e-4, state="int8")
        self.around: Around = contextlib.nullcontext
        self.times = Times()

    def step(self) -> None:
        """One step, timed."""
        with self.around():
            started, used = time.perf_counter(), time.thread_time()
            loss = (self._model(self._inputs) - self._inputs).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.times.cpu_ms.append(1e3 * (time.thread_time() - used))
            self.times.ms.append(1e3 * (time.perf_counter() - started))

    def digest(self) -> str:
        """Of all weights and all state."""
        found = hashlib.sha256()
        for tensor in (
            *self._model.parameters(),
            *(t for state in self.optimizer.state.values() for t in state.values()),
        ):
            found.update(tensor.detach().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def in_turn(runs: list[Training], steps: int) -> None:
    """So many steps of each, one after the other, each time beginning with the next."""
    for number in range(steps):
        turn = number % len(runs)
        for run in runs[turn:] + runs[:turn]:
            run.step()


def start_agent(boards: Path) -> subprocess.Popen[bytes]:
    """An agent that serves."""
    command = [sys.executable, "-m", "optwatch.agent", "--dir", str(boards), "--port", "0"]
    agent = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    if wait_for_agent(boards, 30) is None:
        raise RuntimeError(f"no agent serves {boards} after 30 s")
    return agent


def end(boards: Path, agent: subprocess.Popen[bytes]) -> None:
    """End the agent, and one that was started in its place."""
    with contextlib.suppress(OSError, ValueError):
        other = json.loads((boards / "agent.json").read_bytes())["pid"]
        if other != agent.pid and find_agent(boards):
            os.kill(other, signal.SIGKILL)
    agent.kill()
    agent.wait()


def cpu_of_children() -> float:
    """Seconds that processes which this one has started took, ended ones included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = used.ru_utime + used.ru_stime
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def play(fault: Fault, steps: int, place: Path, healthy_boards: Path, name: str) -> Round:
    """One round."""
    runs = [Training() for _ in range(4)]
    _, healthy, again, troubled = runs
    boards = place / "boards"
    boards.mkdir(mode=0o700)
    with ExitStack() as stack:
        if fault.small:
            stack.callback(unmount, boards)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m,mode=700", "none", boards], check=True)
        agent = start_agent(boards)
        stack.callback(end, boards, agent)
        for run, key in ((healthy, "healthy"), (again, "again")):
            made = optwatch.watch(run.optimizer, directory=healthy_boards, run_id=f"{name}-{key}")
            stack.callback(made.close)
        watch = optwatch.watch(troubled.optimizer, directory=boards, run_id="troubled")
        stack.callback(watch.close)
        in_turn(runs, WARM)
        fault.strike(Scene(boards, agent, watch, stack))
        troubled.around = fault.around
        for run in runs:
            run.times = Times()
        used, started = cpu_of_children(), time.monotonic()
        in_turn(runs, steps)
        percent = 100 * (cpu_of_children() - used) / (time.monotonic() - started)
    while _children:
        os.waitpid(_children.pop(), 0)
    if len({run.digest() for run in runs}) != 1:
        raise AssertionError("watching changed the weights")
    first, second, third, fourth = (run.times for run in runs)
    return Round(first, second, third, fourth, percent)


def unmount(place: Path) -> None:
    """Even while somebody has a file there."""
    subprocess.run(["umount", "--lazy", place], check=True)


def mountable() -> bool:
    """Whether this user can make a small file system."""
    with tempfile.TemporaryDirectory() as place:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "none", place], check=False, capture_output=True)
        if not mounted.returncode:
            unmount(Path(place))
        return not mounted.returncode


def measure(steps: int, rounds: int) -> dict[str, list[Round]]:
    """The rounds of every fault, each fault once before any comes again."""
    found: dict[str, list[Round]] = {
        name: [] for name, fault in FAULTS.items() if not fault.small or mountable()
    }
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="optwatch-benchmark-", dir=memory) as place:
        healthy = Path(place, "healthy")
        healthy.mkdir(mode=0o700)
        agent = start_agent(healthy)
        try:
            for number in range(rounds):
                for index, (name, done) in enumerate(found.items()):
                    own = Path(place, f"{number}-{index}")
                    own.mkdir()
                    done.append(play(FAULTS[name], steps, own, healthy, own.name))
                    print(
                        f"{number + 1}: {name}: {done[-1].ratio('troubled', 'healthy'):.3f}", file=sys.stderr
                    )
                    shutil.rmtree(own, ignore_errors=True)
        finally:
            end(healthy, agent)
    return found


def main() -> int:
    """Measure, write the results, and say whether every fault is within the noise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=120, help="of each run in a round (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    os.environ["OPTWATCH_STORE"] = "off"
    torch.set_num_threads(1)  # the agents and what troubles them need a core
    session.AGENT_CHECK = AGENT_CHECK
    warnings.filterwarnings("ignore", "optwatch: ", RuntimeWarning)
    found = {name: summary(done) for name, done in measure(options.steps, options.rounds).items()}
    missing = [name for name in FAULTS if name not in found]
    text = report(found, missing, options.steps, options.rounds)
    print(text)
    if not options.dry:
        settings = {
            "command": "python -m benchmarks faults",
            "steps": options.steps,
            "rounds": options.rounds,
        }
        facts = {**settings, "load_average": round(os.getloadavg()[0], 2)}
        (RESULTS / "faults.json").write_text(json.dumps({**facts, "faults": found}, indent=1) + "\n")
        (RESULTS / "faults.md").write_text(text)
    return any(
        row[cost] > band(found, noise)[1]
        for row in found.values()
        for cost, noise in (("cost", "noise"), ("cpu_cost", "cpu_noise"))
    )


if __name__ == "__main__":
    sys.exit(main())
