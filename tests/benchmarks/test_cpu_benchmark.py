"""The CPU benchmark runs and says how; no time it measures is judged here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import cpu_cases
from benchmarks.cpu import row
from benchmarks.cpu_cases import CASES, Case
from benchmarks.cpu_report import report
from benchmarks.processes import RESULTS, compact, machine

ROOT = Path(__file__).parents[2]
OURS = [case for case in CASES if case.needs is None]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads that wait for each other on busy cores would make these tests slow, and nothing here is about speed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
def test_every_case_takes_its_samples(case: Case) -> None:
    """Both sides are timed in each round; where watching keeps account, it gives one in each round."""
    found = cpu_cases.sample(case, cpu_cases.QUICK, process=1)
    rounds = {len(found[side]) for side in ("ours", "other")}
    assert rounds == {2}
    assert min(found["ours"] + found["other"] + [found["figure"]]) > 0
    if case.name.startswith("watched"):
        assert len(found["µs a step"]) == 2
        assert min(found["µs a step"]) > 0


@pytest.mark.parametrize("more_is_better", [False, True])
def test_a_figure_compares_neighbours_in_time(more_is_better: bool) -> None:
    """A drift of the machine that both sides share cancels."""
    case = Case("x", "", "", lambda sizes, process: None, unit="× faster" if more_is_better else "×")
    found = cpu_cases.figure(case, ours=[1, 10, 100], other=[2, 20, 200], notes={})
    assert found == (2 if more_is_better else 0.5)


def test_a_run_writes_what_it_found(tmp_path: Path) -> None:
    """The file has the command, the machine, every sample and the verdict; the table is made from it."""
    command = [sys.executable, "-m", "benchmarks.cpu", "--quick", "--processes", "1", "--only", "int8"]
    isa = cpu_cases.library().isa
    subprocess.run(
        [*command, "--output", tmp_path],
        cwd=ROOT,
        env={**os.environ, "OPTWATCH_CPU_ISA": isa},
        check=True,
        timeout=300,
        capture_output=True,
    )
    document = json.loads((tmp_path / "cpu.json").read_text())
    assert document["command"] == "python -m benchmarks.cpu --quick --only int8 --processes 1"
    (row,) = document["results"]
    assert (row["name"], row["isa"], row["problem"]) == ("int8", isa, None)
    assert [len(process["ours"]) for process in row["processes"]] == [2]
    assert row["measured"] > 0
    assert document["machine"]["versions"]["torch"]
    assert (tmp_path / "cpu.md").read_text() == report(document)


@pytest.mark.parametrize(
    ("name", "reached"), [("int8", [True, True, False]), ("torchao", [False, True, True])]
)
def test_a_target_is_held_against_the_median_process(name: str, reached: list[bool]) -> None:
    """A target is reached when it is met exactly; an upper limit from below, a lower one from above."""
    (case,) = (case for case in CASES if case.name == name)
    for factor, expected in zip((0.9, 1.0, 1.1), reached, strict=True):
        figures = [case.target * factor, 0.0, 1e9]
        found = row(case, "avx512", [{"figure": f, "ours": [1.0], "other": [1.0]} for f in figures], None)
        assert (found["measured"], found["lowest"], found["highest"]) == (figures[0], 0.0, 1e9)
        assert found["reached"] is expected


def test_a_narrower_instruction_set_has_a_target_of_its_own_for_int8() -> None:
    """Where int8 is bound by arithmetic; all others have one target."""
    others = {
        case.name: case.target_with("avx2") for case in CASES if case.target_with("avx2") != case.target
    }
    named = [case.name for case in CASES if case.name.endswith("int8") and not case.name.startswith("many")]
    assert others == dict.fromkeys(named, 1.6)


def test_what_was_not_measured_is_said() -> None:
    """A row without samples has no figure and no verdict, and its reason stands below the table."""
    (case,) = (case for case in CASES if case.name == "torchao")
    settings = {"processes": 5, "quick": False, "instruction_sets": ["avx2"]}
    results = [row(case, "avx2", [], "torchao is not installed")]
    text = report({"command": "", "machine": machine(), "settings": settings, "results": results})
    assert "not measured" in text
    assert "torchao is not installed" in text
    assert not re.search(r"\| (yes|no) +\|", text)


def test_lists_of_numbers_take_one_line_and_six_digits() -> None:
    """Thousands of samples stay readable in a diff."""
    text = compact({"samples": [0.123456789, 1e-7, 3], "words": ["a"]})
    assert '"samples": [ 0.123457, 1e-07, 3 ]' in text
    assert json.loads(text)["words"] == ["a"]


#: Cases that came after the last whole run.
TO_MEASURE: set[str] = set()


@pytest.mark.parametrize("name", ["cpu", "cpu-avx2"])
def test_a_committed_result_is_whole_and_names_its_command(name: str) -> None:
    """Every case, with the best instruction set; measured in full size; the table is the file's."""
    document = json.loads((RESULTS / f"{name}.json").read_text())
    assert document["command"] == "python -m benchmarks.cpu"
    assert document["settings"]["quick"] is False
    assert document["settings"]["processes"] >= 3
    best = document["settings"]["instruction_sets"][0]
    measured = {row["name"]: row["measured"] for row in document["results"] if row["isa"] == best}
    assert set(measured) | TO_MEASURE == {case.name for case in CASES}
    assert not set(measured) & TO_MEASURE, "these are measured now: take them off the list"
    assert None not in measured.values()


@pytest.mark.parametrize("name", ["cpu", "cpu-avx2", "cpu-xeon"])
def test_the_committed_table_is_that_of_its_samples(name: str) -> None:
    """On whichever processor."""
    document = json.loads((RESULTS / f"{name}.json").read_text())
    assert (RESULTS / f"{name}.md").read_text() == report(document)
