"""The benchmark of watching runs and says how; no time it measures is judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import watch_cases
from benchmarks.processes import RESULTS, machine
from benchmarks.watch import report, row
from benchmarks.watch_cases import BLOCK, CASES, EVERY, Case

ROOT = Path(__file__).parents[2]
#: One of each way to watch, and of each way to be read.
CASES_HERE = [case for case in CASES if case.name in ("own-step", "own", "fused", "adafactor", "composer")]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads that wait for each other on busy cores would make these tests slow, and nothing here is about speed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("case", CASES_HERE, ids=lambda case: case.name)
def test_every_case_takes_its_samples(case: Case) -> None:
    """Plain, usual and sampled steps on three clocks; and what law forbids is counted as nothing, but for others."""
    found = watch_cases.sample(case, watch_cases.QUICK, process=1)
    assert {kind: len(rows[0]) for kind, rows in found["times"].items()} == {
        "plain": BLOCK, "usual": BLOCK - 1, "sampled": 1,
    }  # fmt: skip
    assert {len(rows) for rows in found["times"].values()} == {3}
    assert found["whole_us"] >= found["step_us"] > 0
    counts = found["counts"]
    assert set(counts) == (set() if case.of == "optimizer" else {"usual", "sampled"})
    for count in counts.values():
        assert count["collectives"] == 0
        if case.by == "optwatch":
            assert count["reads"] == 0
    if case.by == "optwatch" and counts:
        assert counts["usual"]["new_bytes"] == 0
    if case.name == "own":
        assert counts["sampled"]["new_bytes"] == 0
    if case.by == "composer":
        assert counts["sampled"]["reads"] > 9 * 76


def test_sampled_steps_are_those_with_full_statistics() -> None:
    """Of ours, too, which go by the optimizer's count and not by the turn's: with it the kernel says so itself."""
    (case,) = (case for case in CASES if case.name == "own-step")
    scene = watch_cases.Stepping(case.optimizer, watch_cases.QUICK)
    heard: list[tuple[bool, bool]] = []
    with watch_cases.by_optwatch(scene, BLOCK):
        end = scene.optimizer.subscribe(lambda stats: heard.append((stats.full, False)), every=10**9)
        for step in range(1, 3 * BLOCK):
            scene.step()
            heard[-1] = heard[-1][0], watch_cases.is_sampled(scene, "optwatch", step)
        end()
    scene.step()
    assert all(full == said for full, said in heard)
    assert sum(full for full, _ in heard) == 3
    assert (watch_cases.steps_until(scene, "optwatch", "sampled") + 3 * BLOCK) % BLOCK == 1


def test_a_figure_weighs_steps_as_a_user_has_them() -> None:
    """One sampled step in so many; of others the hooks alone, of ours the step, too, of W&B all."""
    times = {
        "plain": [[0.0, 0.1, 1.0]] * 3,
        "usual": [[0.001, 0.101, 1.01]] * 3,
        "sampled": [[0.011, 0.111, 1.11]] * 3,
    }
    expected = {"fused": (0.001, 0.011), "own": (0.002, 0.022), "wandb": (0.01, 0.11)}
    for name, (usual, sampled) in expected.items():
        (case,) = (case for case in CASES if case.name == name)
        found = watch_cases.figures(case, times)
        assert found["figure"] == pytest.approx(((EVERY - 1) * usual + sampled) / EVERY)


def test_a_run_writes_what_it_found(tmp_path: Path) -> None:
    """The file has the command, the machine, every sample and the verdict; the table is made from it."""
    command = [sys.executable, "-m", "benchmarks.watch", "--quick", "--processes", "1", "--only", "own-step"]
    subprocess.run(
        [*command, "--output", tmp_path],
        cwd=ROOT,
        check=True,
        timeout=300,
        capture_output=True,
        env=os.environ,
    )
    document = json.loads((tmp_path / "watch.json").read_text())
    assert document["command"] == "python -m benchmarks.watch --quick --only own-step --processes 1"
    (found,) = document["results"]
    assert (found["name"], found["problem"]) == ("own-step", None)
    assert found["reached"] is (found["measured"] <= 0.02)
    assert (tmp_path / "watch.md").read_text() == report(document)


def test_what_was_not_measured_is_said() -> None:
    """A row without samples has no figure and no verdict, and its reason stands below the table."""
    (case,) = (case for case in CASES if case.name == "wandb")
    settings = {"processes": 3, "quick": False, "every": EVERY}
    results = [row(case, [], "wandb is not installed")]
    text = report({"command": "", "machine": machine(), "settings": settings, "results": results})
    assert "| W&B | torch AdamW, fused | | | | | | not measured |" in text
    assert "- wandb: wandb is not installed" in text


#: Cases that came after the last whole run.
TO_MEASURE: set[str] = set()


def test_the_committed_result_is_whole_and_names_its_command() -> None:
    """Every case, measured in full; the table is the file's."""
    measured: set[str] = set()
    if (RESULTS / "watch.json").exists():
        document = json.loads((RESULTS / "watch.json").read_text())
        assert document["command"] == "python -m benchmarks.watch"
        assert document["settings"]["processes"] >= 3
        measured = {found["name"] for found in document["results"] if found["measured"] is not None}
        assert (RESULTS / "watch.md").read_text() == report(document)
    assert measured | TO_MEASURE == {case.name for case in CASES}
    assert not measured & TO_MEASURE, "these are measured now: take them off the list"
