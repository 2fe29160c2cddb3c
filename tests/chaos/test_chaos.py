"""Whatever happens to the agent, the boards and the machine: the same weights, bit by bit, and losses are counted.

Every case is a row of `FAULTS`: what is done to the training run at half time, to the agent, and what is to be seen
when training has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent_process import Scrape, agent, eventually, get, scrape
from board_samples import environment
from nvml_library import build_nvml
from optwatch.board import BoardReader
from otlp_receivers import over_http

pytestmark = pytest.mark.integration

STEPS, HALF = 120, 20


class Trainer:
    """The process that forks a training run for each case."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("training.py")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "always", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment(), "OMP_NUM_THREADS": "1"},
        )

    def start(self, folder: Path, boards: Path, then: str = "", watched: bool = True) -> int:
        """Start a run; returns its process id."""
        job = {"folder": str(folder), "boards": str(boards), "then": then, "watch": watched}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """The status with which the run ended."""
        return int(self._line())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@dataclass
class Scene:
    """What a fault may touch."""

    folder: Path
    boards: Path
    url: str
    agent: subprocess.Popen[bytes]
    training: int
    cleanup: contextlib.ExitStack

    @property
    def board(self) -> Path:
        return self.boards / "run-0.board"

    @property
    def page(self) -> Scrape:
        return scrape(self.url)

    @property
    def training_log(self) -> str:
        return (self.folder / "training.log").read_text()

    def another_agent(self) -> None:
        """Let another agent take over."""
        self.url, self.agent = self.cleanup.enter_context(agent(self.boards))

    def go(self) -> None:
        (self.folder / "go").touch()


@dataclass(frozen=True)
class Fault:
    """One row: ``strike`` when training is at half, ``check`` when it has ended."""

    name: str
    strike: Callable[[Scene], object] = lambda scene: None
    check: Callable[[Scene], object] = lambda scene: None
    then: str = ""  # what the training process itself does at half time, see training.py
    options: Callable[[Path, contextlib.ExitStack], list[str]] = lambda folder, stack: []
    environment: Callable[[Path, Path], dict[str, str]] = lambda folder, library: {}
    before: str = ""  # code that the agent's process runs first
    ends: bool = True  # whether training reaches its end


def all_seen(scene: Scene) -> None:
    """The counters are whole, the newest step is the last one."""

    def seen() -> None:
        page = scene.page
        assert page.one("optwatch_steps_total") == STEPS
        assert page.one("optwatch_step") == STEPS

    eventually(seen)


def send(number: int) -> Callable[[Scene], None]:
    return lambda scene: scene.agent.send_signal(number)


def kill_agent(scene: Scene) -> None:
    scene.agent.kill()
    scene.agent.wait()


def end_agent(scene: Scene) -> None:
    scene.agent.terminate()
    assert scene.agent.wait(20) == 0


def resumed(scene: Scene) -> None:
    """What was overwritten while the agent stood still is counted; counters are whole."""
    scene.agent.send_signal(signal.SIGCONT)
    all_seen(scene)
    dropped = scene.page.one("optwatch_samples_dropped_total")
    assert 0 < dropped < STEPS - HALF


def taken_over(scene: Scene) -> None:
    scene.another_agent()
    all_seen(scene)


def skipped(scene: Scene, *reasons: str) -> None:
    """Wait until the agent has counted the board for one of these reasons."""

    def counted() -> None:
        page = scene.page
        assert sum(sum(page.all("optwatch_boards_skipped_total", reason=r)) for r in reasons) >= 1
        assert page.all("optwatch_step") == []

    eventually(counted)


def truncate(scene: Scene) -> None:
    os.truncate(scene.board, 100)
    skipped(scene, "truncated")


def noise(scene: Scene) -> None:
    with scene.board.open("r+b") as file:
        file.write(os.urandom(scene.board.stat().st_size))
    skipped(scene, "corrupt")


def fuzz(scene: Scene) -> None:
    """Random bytes at random places for as long as training goes on."""
    ended = threading.Event()
    size = scene.board.stat().st_size

    def write() -> None:
        with scene.board.open("r+b", buffering=0) as file:
            while not ended.wait(0.001):
                file.seek(int.from_bytes(os.urandom(4), "little") % size)
                file.write(os.urandom(64))

    thread = threading.Thread(target=write)
    thread.start()
    scene.cleanup.callback(thread.join)
    scene.cleanup.callback(ended.set)


def still_serves(scene: Scene) -> None:
    """The agent lives and what it serves parses."""
    assert scene.agent.poll() is None
    assert scene.page.one("optwatch_build_info") == 1


def whole_or_counted(scene: Scene) -> None:
    """All of the run is there, or the board is counted as skipped and nothing of it is shown."""
    still_serves(scene)

    def told() -> None:
        page = scene.page
        if sum(page.all("optwatch_boards_skipped_total")) == 0:
            assert page.all("optwatch_steps_total") == [STEPS]
        else:
            assert page.all("optwatch_steps_total") in ([], [STEPS])

    eventually(told)


def remove_directory(scene: Scene) -> None:
    shutil.rmtree(scene.boards)
    scene.cleanup.callback(scene.boards.mkdir, 0o700)


def no_step_is_shown_twice(scene: Scene) -> None:
    """Writes that failed are counted, and the training process was told nothing worse."""

    def counted() -> None:
        page = scene.page
        assert page.one("optwatch_step") == HALF
        assert page.one("optwatch_rank_up") == 0

    eventually(counted)


def one_warning(scene: Scene) -> None:
    assert scene.training_log.count("optwatch: watching ended") == 1, scene.training_log
    still_serves(scene)


def clock(hours: int) -> str:
    """Code that sets the agent's clock when there is a file ``turned`` beside the boards."""
    return (
        "import os, sys, time; real, path = time.time, sys.argv[sys.argv.index('--dir') + 1] + '/turned'\n"
        f"time.time = lambda: real() + (3600 * {hours} if os.path.exists(path) else 0)"
    )


def turn_clock(scene: Scene) -> None:
    (scene.boards / "turned").touch()


def kept_for_the_grace_period(scene: Scene) -> None:
    all_seen(scene)
    time.sleep(0.2)  # several polls
    assert scene.page.one("optwatch_run_state", state="finished") == 1


def collector(wait: float, refuse: bool) -> Callable[[Path, contextlib.ExitStack], list[str]]:
    def options(_: Path, stack: contextlib.ExitStack) -> list[str]:
        received = stack.enter_context(over_http())
        received.wait, received.refuse = wait, refuse
        return ["--otlp-endpoint", received.url, "--otlp-interval", "0.05"]

    return options


def blackhole(_: Path, stack: contextlib.ExitStack) -> list[str]:
    """A socket that takes connections and never says a word."""
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    return ["--otlp-endpoint", f"http://127.0.0.1:{server.getsockname()[1]}", "--otlp-interval", "0.05"]


def pushes_fail(reason: str) -> Callable[[Scene], None]:
    def check(scene: Scene) -> None:
        def counted() -> None:
            assert scene.page.one("optwatch_otlp_failures_total", reason=reason) >= 1

        eventually(counted)
        all_seen(scene)
        end_agent(scene)

    return check


def taken_port(_: Path, stack: contextlib.ExitStack) -> list[str]:
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    return ["--port", str(server.getsockname()[1])]


def driver(folder: Path, library: Path) -> dict[str, str]:
    (folder / "driver").write_text("")
    return {"LD_LIBRARY_PATH": str(library), "FAKE_NVML": str(folder / "driver")}


def order(line: str) -> Callable[[Scene], None]:
    """Let the driver do this once the device is up, and wait until it shows."""

    def strike(scene: Scene) -> None:
        eventually(lambda: up(scene, 1))
        (scene.folder / "driver").write_text(line)
        eventually(lambda: up(scene, 0))

    return strike


def up(scene: Scene, value: float) -> None:
    assert scene.page.all("optwatch_device_up") == [value]


def returned(scene: Scene) -> None:
    assert scene.page.one("optwatch_nvml_errors_total") >= 1
    (scene.folder / "driver").write_text("")
    eventually(lambda: up(scene, 1))
    all_seen(scene)


def crowd(scene: Scene) -> None:
    """Three hundred scrapers at once, most of which are turned away."""
    served: list[int] = []

    def ask() -> None:
        with contextlib.suppress(OSError):
            served.append(len(get(scene.url)[1]))

    threads = [threading.Thread(target=ask) for _ in range(300)]
    for thread in threads:
        thread.start()
    scene.go()
    for thread in threads:
        thread.join()
    assert served, "nobody was served"


def kill_training(scene: Scene) -> None:
    """In the middle of its steps, whatever it is writing."""
    scene.go()
    before = BoardReader(scene.board)
    while before.live().step < HALF + 10:
        time.sleep(0.001)
    os.kill(scene.training, signal.SIGKILL)


def ended_as(state: str, step: int) -> Callable[[Scene], None]:
    def check(scene: Scene) -> None:
        def seen() -> None:
            page = scene.page
            assert page.one("optwatch_run_state", state=state) == 1
            assert page.one("optwatch_rank_up") == 0
            assert page.one("optwatch_step") >= step
            assert page.one("optwatch_steps_total") == page.one("optwatch_step")

        eventually(seen)

    return check


FAULTS = [
    Fault("nothing", check=all_seen),
    Fault("agent killed", kill_agent, taken_over),
    Fault("agent stopped", send(signal.SIGSTOP), resumed),
    Fault("agent ended by a scheduler", end_agent, taken_over),
    Fault("board truncated", truncate, all_seen),
    Fault("board overwritten with noise", noise, all_seen),
    Fault("board fuzzed", fuzz, whole_or_counted),
    Fault("no room for a record", check=no_step_is_shown_twice, then="run out of room"),
    Fault("directory removed", remove_directory, all_seen),
    Fault("directory removed, new generation", remove_directory, one_warning, then="log something new"),
    Fault("new generation", check=all_seen, then="log something new"),
    Fault("clock of training forward", check=all_seen, then="clock forward"),
    Fault("clock of training back", check=all_seen, then="clock back"),
    Fault("clock of the agent forward", turn_clock, kept_for_the_grace_period, before=clock(24)),
    Fault("clock of the agent back", turn_clock, kept_for_the_grace_period, before=clock(-24)),
    Fault("collector refuses", check=pushes_fail("refused"), options=collector(0.0, True)),
    Fault("collector is slow", check=pushes_fail("overflow"), options=collector(30.0, False)),
    Fault("collector is a black hole", check=pushes_fail("overflow"), options=blackhole),
    Fault("port taken", check=all_seen, options=taken_port),
    Fault("driver hangs", order("hung 0"), returned, environment=driver),
    Fault("device lost", order("lost 0"), returned, environment=driver),
    Fault("driver missing", check=all_seen, environment=lambda *_: {"LD_LIBRARY_PATH": ""}),
    Fault("fork after watch", check=all_seen, then="fork"),
    Fault("hundreds of scrapers", crowd, all_seen),
    Fault("training killed", kill_training, ended_as("lost", HALF + 10), ends=False),
    Fault("training exits", check=ended_as("finished", HALF), then="exit", ends=False),
    Fault("training exits at once", check=ended_as("lost", HALF), then="exit at once", ends=False),
    Fault("training raises", check=ended_as("failed", HALF), then="raise", ends=False),
    Fault("SIGTERM of a scheduler", check=ended_as("lost", HALF), then="sigterm", ends=False),
]


@pytest.fixture(scope="module")
def trainer() -> Iterator[Trainer]:
    made = Trainer()
    yield made
    made.close()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for the driver."""
    return build_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="module")
def expected(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a run that nobody watches."""
    folder = tmp_path_factory.mktemp("unwatched")
    (folder / "go").touch()
    trainer.start(folder, folder, watched=False)
    assert trainer.wait() == 0, (folder / "training.log").read_text()
    return (folder / "result").read_text()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_training_goes_on(
    fault: Fault, trainer: Trainer, library: Path, expected: str, tmp_path: Path
) -> None:
    """The same weights and state, and what was lost is counted."""
    boards = tmp_path / "boards"
    boards.mkdir(mode=0o700)
    with contextlib.ExitStack() as stack:
        options = fault.options(tmp_path, stack)
        url, process = stack.enter_context(
            agent(
                boards, "--device-interval", "0.05", "--device-limit", "0.3", *options,
                environment=fault.environment(tmp_path, library), before=fault.before,
            )
        )  # fmt: skip
        scene = Scene(tmp_path, boards, url, process, trainer.start(tmp_path, boards, fault.then), stack)
        eventually(lambda: _exists(tmp_path / "half"), 120)  # torch may still be loading
        eventually(lambda: _at_half(scene))
        fault.strike(scene)
        scene.go()
        status = trainer.wait()
        if fault.ends:
            assert status == 0, scene.training_log
            assert (tmp_path / "result").read_text() == expected
        fault.check(scene)


def _exists(path: Path) -> None:
    assert path.exists()


def _at_half(scene: Scene) -> None:
    assert scene.page.all("optwatch_step") == [HALF]


def test_a_full_file_system_is_one_warning(trainer: Trainer, expected: str, tmp_path: Path) -> None:
    """No room for a board: the run is not watched, says so once, and is the same run."""
    boards = tmp_path / "boards"
    boards.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "none", boards], check=False, capture_output=True
    ).returncode:
        pytest.skip("platform: a small file system can be mounted by root only")
    try:
        boards.chmod(0o700)
        (tmp_path / "go").touch()
        trainer.start(tmp_path, boards)
        assert trainer.wait() == 0
    finally:
        subprocess.run(["umount", boards], check=True)
    assert (tmp_path / "result").read_text() == expected
    log = (tmp_path / "training.log").read_text()
    assert log.count("optwatch: ") == 1, log
    assert "could not be reserved" in log
