"""Every example runs, watched by its one line, and by none under ``optwatch run``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optwatch.board import BoardReader

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).parents[2] / "examples"
#: Script -> steps of its optimizer, and what else its one line publishes: counters, and events with their number.
SCRIPTS = {
    "plain_loop": (30, {"training.tokens": 30 * 8 * 17, "events/evaluation": 1}),
    "accelerate_loop": (8, {}),
    "lightning_fit": (8, {}),
    "huggingface_lora": (8, {"training.tokens": 8 * 4 * 32, "events/checkpoint": 2}),
}


def run(command: list[str], boards: Path) -> subprocess.CompletedProcess[str]:
    boards.mkdir(mode=0o700)
    environment = {**os.environ, "OPTWATCH_DIR": str(boards), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def counters(path: Path) -> dict[str, float]:
    reader = BoardReader(path)
    assert reader.live().state.name == "FINISHED"
    found = {}
    for series, value in zip(reader.schema.counters, reader.live().counters, strict=True):
        event = series.labels.get("event")
        found[series.name.removeprefix("optwatch.") + (f"/{event}" if event else "")] = float(value)
    return found


def without_its_line(script: Path, to: Path) -> Path:
    """The example without watching."""
    text = re.sub(r"(?m)^.*# this line\n", "", script.read_text(encoding="utf-8"))
    text = re.sub(r"(?m)^ *watch\..*\n|^.*integrations.*\n|^import optwatch\n", "", text)
    text = re.sub(r"(?m)^( *)if step == 20:\n", "", text)
    to.write_text(text, encoding="utf-8")
    assert "watch." not in text.replace("optwatch.", "")
    return to


@pytest.mark.parametrize("name", SCRIPTS)
def test_example(name: str, tmp_path: Path) -> None:
    """Both ways count the same steps, and the script says the same without its line."""
    steps, expected = SCRIPTS[name]
    script = EXAMPLES / f"{name}.py"
    done = run([sys.executable, str(script)], tmp_path / "line")
    (board,) = (tmp_path / "line").glob("*.board")
    found = counters(board)
    assert found["steps"] == steps
    assert {key: found[key] for key in expected} == expected
    plain = without_its_line(script, tmp_path / f"{name}.py")
    command = [sys.executable, "-m", "optwatch", "run", "--no-agent", "--", sys.executable, str(plain)]
    bare = run(command, tmp_path / "none")
    (board,) = (tmp_path / "none").glob("*.board")
    assert counters(board)["steps"] == steps
    assert bare.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]


@pytest.mark.parametrize("how", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_distributed(how: list[str], tmp_path: Path) -> None:
    """Two ranks, one run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = run([*command, str(EXAMPLES / "distributed.py"), *how], tmp_path / "boards")
    lines = sorted(line for line in done.stdout.replace("trained", "trained\n").splitlines() if line)
    assert lines == ["rank 0 of 2 trained", "rank 1 of 2 trained"]
    boards = sorted((tmp_path / "boards").glob("*.board"))
    assert len(boards) == 2
    assert [counters(path)["training.samples"] for path in boards] == [80, 80]
    assert len({BoardReader(path).schema.run["run_id"] for path in boards}) == 1
