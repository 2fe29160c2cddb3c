"""``optwatch run``: every optimizer of a script that knows nothing of it, and nothing else about the script changes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from optwatch.board import BoardReader

pytestmark = pytest.mark.integration

SCRIPT = """
import hashlib, multiprocessing, os, sys, torch
from bitsandbytes.optim import AdamW8bit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from optwatch.optim import Lion
{imports}
def train(seed, workers=0, compiled=False):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 300))
    optimizers = [
        torch.optim.AdamW(model[0].parameters()), torch.optim.SGD(model[2].parameters(), lr=0.1),
        Lion([model[4].weight], lr=1e-3, state="int8"), AdamW8bit([model[4].bias], min_8bit_size=1),
    ]
    {watch}
    steps = [one.step for one in optimizers]
    call = model
    if compiled:
        call = torch.compile(model, backend="eager")
        steps[:3] = [torch.compile(step, backend="eager") for step in steps[:3]]
    data = DataLoader(TensorDataset(torch.randn(40, 16)), batch_size=8, num_workers=workers)
    for _ in range(2):
        for (x,) in data:
            call(x).square().mean().backward()
            for step in steps:
                step()
            model.zero_grad()
    {close}
    raw = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    print(hashlib.sha256(raw).hexdigest())

if __name__ == "__main__":
    print("out", sys.argv[1:], sys.path[1:], sorted(sys.modules.get("sitecustomize").__dict__.get("mine", [])))
    print("err", file=sys.stderr)
    train(0, workers=2)
    train(0, compiled=True)
    child = multiprocessing.get_context("fork").Process(target=train, args=(1,))
    child.start(); child.join()
    sys.stdout.flush()
    sys.exit(7)
"""
PLAIN = SCRIPT.format(imports="", watch="", close="")
#: The same with one line, and one more because there are three trainings.
WATCHED = SCRIPT.format(
    imports="import optwatch",
    watch="watch = optwatch.watch("
    'optimizers, run_id=f"line-{os.getpid()}-{compiled}", every=3, shadow=0.5, agent=False)',
    close="watch.close()",
)
STEPS = {"AdamW": 10, "SGD": 10, "Lion": 10, "AdamW8bit": 10}


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a script, and a ``sitecustomize`` of the user's own on the path."""
    (tmp_path / "train.py").write_text(PLAIN)
    (tmp_path / "watched.py").write_text(WATCHED)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text('mine = ["here"]\n')
    (tmp_path / "boards").mkdir(mode=0o700)
    return tmp_path


def optwatch(place: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "optwatch", "run", "--no-agent", "--dir", str(place / "boards"), "--every", "3", *options,
        "--",
    ]  # fmt: skip


def boards(place: Path) -> list[BoardReader]:
    return [BoardReader(path) for path in sorted((place / "boards").glob("*.board"))]


@pytest.mark.slow
def test_nothing_about_the_script_changes(place: Path) -> None:
    """Weights, output, exit code, path and one's own sitecustomize: under `optwatch run`, with `watch()`, with both.

    Optimizers of ours and of others are stepped beside forked workers, compiled, and in a forked trainer.
    """
    path = os.pathsep.join([str(place / "own"), os.environ.get("PYTHONPATH", "")])
    given = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPTWATCH_DIR": str(place / "boards")}
    plain = run([sys.executable, "train.py", "--lr", "1"], place, **given)
    assert plain.returncode == 7, plain.stderr
    assert "here" in plain.stdout
    for options, script, boards_made in (
        (
            optwatch(place),
            "train.py",
            2,
        ),  # the process has one board for both of its trainings, its child another
        ([], "watched.py", 3),
        (optwatch(place), "watched.py", 3),
    ):
        for board in (place / "boards").iterdir():
            board.unlink()
        done = run([*options, sys.executable, script, "--lr", "1"], place, **given)
        assert (done.stdout, done.returncode) == (plain.stdout, 7), (options, script, done.stderr)
        assert without_times(done.stderr) == without_times(plain.stderr)
        found = boards(place)
        assert len(found) == boards_made, (options, script)
        steps = [counted(reader) for reader in found]
        assert all(one == STEPS for one in steps), steps
        assert not (place / "boards" / "run.log").exists()


def without_times(text: str) -> str:
    """What torch logs in compiling has the time and the process in front."""
    return re.sub(r"(?m)^([VIWE])\d{4} [\d:.]+ \d+ ", r"\1 ", text)


def counted(reader: BoardReader) -> dict[str, float]:
    """Steps by optimizer."""
    return {
        series.labels["optimizer"]: value
        for series, value in zip(reader.schema.counters, reader.live().counters, strict=True)
        if series.name == "optwatch.steps"
    }


def test_names_come_from_the_model(place: Path) -> None:
    """Found without being given: the parameters of optwatch's own optimizers have their names in the board."""
    (place / "own.py").write_text(
        "import torch\nfrom optwatch.optim import AdamW\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))\n"
        "optimizer = AdamW(model.parameters())\n"
        "model(torch.ones(1, 8)).sum().backward()\noptimizer.step()\n"
    )
    done = run([*optwatch(place), sys.executable, "own.py"], place)
    assert done.returncode == 0, done.stderr
    (reader,) = boards(place)
    names = [tensor.name for tensor in reader.schema.tables[0].tensors]
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert reader.live().state.name == "FINISHED"


def test_a_script_that_watches_itself(place: Path) -> None:
    """Its own watch() goes first, gets the optimizers that it left out, and does not warn."""
    (place / "self.py").write_text(
        "import torch, optwatch\n"
        "a, b = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))\n"
        "first, second = torch.optim.SGD([a], lr=1.0), torch.optim.Adam([b])\n"
        "def step():\n"
        "    for p, o in ((a, first), (b, second)):\n"
        "        p.grad = torch.ones(4); o.step()\n"
        "step()\n"
        "with optwatch.watch(first, agent=False):\n"
        "    step()\n"
    )
    done = run([*optwatch(place, "--run-id", "mine"), sys.executable, "self.py"], place)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (reader,) = boards(place)
    assert reader.schema.run["run_id"] == "mine"
    found = [
        series.labels["optimizer"] for series in reader.schema.counters if series.name == "optwatch.steps"
    ]
    assert found == ["SGD", "Adam"]


def test_torchrun(place: Path) -> None:
    """Every rank has its board, of one run."""
    (place / "ranks.py").write_text(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "p = torch.nn.Parameter(torch.ones(4))\no = torch.optim.Adam([p])\n"
        "p.grad = torch.ones(4)\no.step()\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "ranks.py"]
    done = run([*optwatch(place), *command], place, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    found = boards(place)
    assert [reader.schema.run["rank"] for reader in found] == [0, 1]
    assert len({reader.schema.run["run_id"] for reader in found}) == 1


def test_signals_are_the_commands(place: Path) -> None:
    """The process is the command itself: a signal ends it as it would have."""
    process = subprocess.Popen(
        [*optwatch(place), sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE, cwd=place, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument 'COMMAND...'"),
        (["no-such-command"], 127, "'no-such-command': command not found"),
        (["/etc/passwd"], 126, "'/etc/passwd' cannot be run: permission denied"),
        (["--every", "0", "true"], 2, "0 is not in the range"),
        (["--run-id", "a b", "true"], 2, "run_id='a b'"),
        (["--dir", "/proc/nothing", "true"], 2, "cannot be made"),
        (["--dir", "", "true"], 2, "--dir is empty: expected a directory"),
        ([""], 127, "the command is empty: expected a program"),
    ],
)
def test_bad_input(place: Path, arguments: list[str], code: int, message: str) -> None:
    """One line, and a shell's exit code."""
    done = run([sys.executable, "-m", "optwatch", "run", *arguments], place)
    assert done.returncode == code
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
