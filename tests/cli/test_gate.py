"""The regression gate on real runs: what passes, what fails, what is said, and what bad input is told."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch
from torch import nn

import optwatch
from cli.pages import page
from optwatch.cli import main
from optwatch.optim import AdamW


def train(directory: Path, run_id: str, state: str = "int8", steps: int = 2) -> Path:
    """A short watched run whose board stays behind."""
    directory.mkdir(mode=0o700, exist_ok=True)
    torch.manual_seed(0)
    model = nn.Linear(80, 80)
    optimizer = AdamW(model.parameters(), state=state)
    with optwatch.watch(optimizer, model, run_id=run_id, directory=directory, agent=False):
        for _ in range(steps):
            model(torch.randn(4, 80)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run in int8, the same again, one in fp32, and one that took no step."""
    directory = tmp_path_factory.mktemp("gate") / "boards"
    for name, state, steps in (
        ("first", "int8", 2),
        ("again", "int8", 2),
        ("fat", "fp32", 2),
        ("idle", "int8", 0),
    ):
        train(directory, name, state, steps)
    return directory


@pytest.fixture
def baseline(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "baseline.json"
    assert main(["baseline", "record", str(runs), "--run-id", "first", "-o", str(path)]) == 0
    assert "values of run first" in capsys.readouterr().out
    # Times on a busy machine are no part of these tests.
    document = json.loads(path.read_text())
    document["tolerances"]["overhead"] = 1e9
    path.write_text(json.dumps(document))
    return path


def test_what_a_baseline_holds(baseline: Path) -> None:
    """Bytes by slot and type to the byte, errors by slot, host memory, overhead; readable and editable."""
    document = json.loads(baseline.read_text())
    values = document["values"]
    small, elements = 80, 80 * 80 + 80  # the bias is kept in fp32
    assert values["state_bytes/AdamW/exp_avg/int8"] == 6400 / elements
    assert values["state_bytes/AdamW/exp_avg/float32"] == 4 * small / elements
    assert 0 < values["quantization_error/AdamW/exp_avg"] < 0.02
    assert 0 < values["update_error/AdamW"] < 0.1
    assert values["peak_memory/host"] > 1e7
    assert values["overhead"] > 0
    assert document["run"]["run_id"] == "first"


def test_the_same_run_passes(runs: Path, baseline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By directory and id, and by the board itself."""
    common = ["--baseline", str(baseline)]
    for where in ([str(runs), "--run-id", "again"], [str(runs / "again-0.board")]):
        assert main(["check", *where, *common]) == 0
        assert "values pass" in capsys.readouterr().out


def test_fp32_state_fails(
    runs: Path, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, a line for each value with both numbers, and JUnit's XML that says the same."""
    xml = tmp_path / "check.xml"
    code = main(["check", str(runs), "--run-id", "fat", "--baseline", str(baseline), "--junit", str(xml)])
    out = capsys.readouterr().out
    assert code == 1
    assert "FAIL  state_bytes/AdamW/exp_avg/int8" in out
    assert "not found in the run" in out
    line = next(line for line in out.splitlines() if "state_bytes/AdamW/exp_avg/float32" in line)
    assert line.startswith("FAIL")
    assert "4 B/parameter" in line
    suite = ET.parse(xml).getroot().find("testsuite")
    assert suite is not None
    cases = suite.findall("testcase")
    failures = {case.get("name") for case in cases if case.find("failure") is not None}
    assert int(suite.get("failures", "")) == len(failures)
    assert int(suite.get("tests", "")) == len(cases)
    assert "AdamW/exp_avg/int8" in failures
    assert f"{len(failures)} of {len(cases)} values fail" in out


@pytest.mark.parametrize(
    ("change", "tolerance", "code"),
    [
        ({"update_error/AdamW": 0.5}, None, 1),  # the baseline's value was half of what is found
        ({"update_error/AdamW": 0.5}, "update_error=1.1", 0),
        ({"update_error/AdamW": 0.5}, "update_error/AdamW=1.1", 0),
        ({"update_error/AdamW": 0.5}, "quantization_error=9", 1),
        ({"update_error/AdamW": 3.0}, None, 0),  # better than before
        ({"state_bytes/AdamW/exp_avg/int8": 1.01}, None, 1),  # less state than before is a finding, too
        ({"state_bytes/AdamW/exp_avg/int8": 1.01}, "state_bytes=0.02", 0),
        ({"peak_memory/host": 0.5}, None, 1),
    ],
)
def test_tolerances(runs: Path, baseline: Path, change: dict, tolerance: str | None, code: int) -> None:
    """In the file, by quantity or by part of it; overridden on the command line."""
    document = json.loads(baseline.read_text())
    for name, factor in change.items():
        document["values"][name] *= factor
    baseline.write_text(json.dumps(document))
    options = ["--tolerance", tolerance] if tolerance else []
    assert main(["check", str(runs), "--run-id", "first", "--baseline", str(baseline), *options]) == code


def test_recording_again_keeps_tolerances(runs: Path, baseline: Path) -> None:
    """A person has set them."""
    assert main(["baseline", "record", str(runs), "--run-id", "fat", "-o", str(baseline)]) == 0
    document = json.loads(baseline.read_text())
    assert document["tolerances"]["overhead"] == 1e9
    assert document["run"]["run_id"] == "fat"


def test_a_saved_metrics_page(baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What an agent served is as good as a board."""
    saved = tmp_path / "metrics.txt"
    saved.write_text(page(fp32=True))
    assert main(["check", str(saved), "--baseline", str(baseline)]) == 1
    assert "state_bytes/AdamW/exp_avg_sq/float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{runs}"], "expected one run in {runs}, found again, fat, first, idle; name one with --run-id"),
        (["{runs}", "--run-id", "none"], "no run 'none' in {runs}: again, fat, first, idle"),
        (["{runs}", "--run-id", "idle"], "run 'idle' has no optimizer state: it has taken no step"),
        (["{tmp}"], "expected one run in {tmp}, found none"),
        (["{tmp}/nowhere"], "'{tmp}/nowhere': no such directory or file"),
        (["nobody"], "no run 'nobody' in"),
        (["nobody", "--run-id", "x"], "'nobody' is no directory, file or address"),
        (["127.0.0.1:1"], "http://127.0.0.1:1/metrics does not answer"),
        (["{tmp}/broken.board"], "broken.board: 3 bytes, expected"),
        (["{tmp}/broken.json"], "{tmp}/broken.json is not a metrics page"),
        (["{runs}", "--run-id", "first", "--tolerance", "speed=2"], "--tolerance 'speed=2': expected NAME=VALUE"),
        (["{runs}", "--run-id", "first", "--tolerance", "overhead=-1"], "--tolerance 'overhead=-1': expected"),
        (["{runs}", "--run-id", "first", "--junit", "{tmp}/no/x.xml"], "x.xml: cannot be written: no such file"),
        (["{runs}", "--run-id", "first", "--junit", "{tmp}/./baseline.json"], "overwrite the baseline"),
        (["{runs}", "--baseline", "{tmp}/none.json"], "none.json: cannot be read: no such file or directory"),
        (["{runs}", "--baseline", "{tmp}/broken.json"], "broken.json is not JSON"),
        (["{runs}", "--baseline", "{tmp}/other.json"], "other.json is not a baseline of version 1"),
        (["{runs}", "--baseline", "{tmp}/empty.json"], "'values' should map names to numbers"),
        (["{runs}", "--baseline", "{tmp}/text.json"], "values 'overhead' is 'low', expected a number"),
        (["{runs}", "--baseline", "{tmp}/odd.json"], "values 'speed' is about nothing known"),
    ],
)  # fmt: skip
def test_bad_input(
    runs: Path, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:  # fmt: skip
    """One line, and exit code 2: nothing was compared."""
    for name, text in {
        "broken.board": "abc",
        "broken.json": "{",
        "other.json": "{}",
        "empty.json": '{"version": 1, "tolerances": {}, "values": {}}',
        "text.json": '{"version": 1, "tolerances": {}, "values": {"overhead": "low"}}',
        "odd.json": '{"version": 1, "tolerances": {}, "values": {"speed": 1}}',
    }.items():
        (tmp_path / name).write_text(text)
    filled = [one.format(runs=runs, tmp=tmp_path) for one in arguments]
    if "--baseline" not in filled:
        filled += ["--baseline", str(baseline)]
    assert main(["check", *filled]) == 2
    err = capsys.readouterr().err
    assert err.startswith("optwatch: ")
    assert len(err.splitlines()) == 1
    assert message.format(runs=runs, tmp=tmp_path) in err


def test_a_file_that_is_no_baseline_is_not_overwritten(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is lost by a wrong -o."""
    precious = tmp_path / "train.py"
    precious.write_text("import torch\n")
    assert main(["baseline", "record", str(runs), "--run-id", "first", "-o", str(precious)]) == 2
    assert "is not JSON" in capsys.readouterr().err
    assert precious.read_text() == "import torch\n"
