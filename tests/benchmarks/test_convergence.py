"""The convergence benchmark trains, pairs its runs and says what it found; its committed result is whole."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.convergence import RESULTS, SEEDS, TORCH, settings, train
from benchmarks.convergence_report import lines, plot, report
from benchmarks.convergence_tasks import TASKS
from optwatch.codecs import FORMATS

DOCUMENT = json.loads((RESULTS / "convergence.json").read_text())


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_fixes_everything_but_the_format(name: str) -> None:
    """fp32 is torch's, to rounding; int8 is near, and not the same; state is quantised."""
    task = TASKS[name]()._replace(
        held_out=lambda model: sum(p.double().square().sum() for p in model.parameters())
    )
    exact, theirs, low, again = (train(task, kind, 1, 3) for kind in ("fp32", TORCH, "int8", "int8"))
    assert exact["train"] == pytest.approx(theirs["train"], rel=1e-5)
    assert low == again
    assert low["held_out"] != exact["held_out"]
    assert low["train"] == pytest.approx(exact["train"], rel=1e-2)
    assert low["bytes"] < 0.3 * exact["bytes"]
    assert train(task, "fp32", 2, 3)["train"] != exact["train"]


def test_the_committed_result_is_whole() -> None:
    """Every format, task and seed, in full length; table and picture are made from the file."""
    assert DOCUMENT["command"] == "python -m benchmarks.convergence"
    wanted = {f"{kind} {task} {seed}" for kind in (TORCH, *FORMATS) for task in TASKS for seed in SEEDS}
    assert set(DOCUMENT["runs"]) == wanted
    tasks = {name: make() for name, make in TASKS.items()}
    now = settings(tasks, steps=500)
    assert [DOCUMENT["settings"][key] for key in ("steps", "seeds", "last", "options")] == [
        now[key] for key in ("steps", "seeds", "last", "options")
    ]
    assert (RESULTS / "convergence.md").read_text() == report(DOCUMENT)
    assert (RESULTS / "convergence.svg").read_text() == plot(DOCUMENT)


@pytest.mark.parametrize("task", TASKS)
def test_every_8_bit_format_ends_within_the_seed_noise(task: str) -> None:
    """What the table claims, from its numbers."""
    found, noise = lines(DOCUMENT, task)
    by_format = {line.kind: line for line in found}
    for kind in ("bf16", "int8", "int8_dynamic", "fp8"):
        assert abs(by_format[kind].mean) <= noise
    exact = torch.tensor(by_format["fp32"].losses, dtype=torch.float64)
    assert noise == pytest.approx(exact.std().item())
