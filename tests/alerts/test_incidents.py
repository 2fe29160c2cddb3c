"""State that silently grows: each incident is caught by a metric at the first step, by the gate and by an alert."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from alerts.incidents import INCIDENTS, Incident
from alerts.test_alerts import promtool
from optwatch.cli import main
from optwatch.cli.gate.runs import find_run
from optwatch.cli.scrape import Page

Boards = dict[str, Path]


@pytest.fixture(scope="module", params=INCIDENTS, ids=lambda incident: incident.what)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Incident, Boards]:
    """An incident with the boards of its good and its bad run."""
    incident: Incident = request.param
    boards = {}
    for name, run in (("good", incident.good), ("bad", incident.bad)):
        boards[name] = tmp_path_factory.mktemp(name) / "boards"
        boards[name].mkdir(mode=0o700)
        run(boards[name])
    return incident, boards


def _pages(boards: Boards) -> dict[str, Page]:
    return {name: find_run(str(directory), None)[0] for name, directory in boards.items()}


def test_the_metric_shows_it_at_the_first_step(case: tuple[Incident, Boards]) -> None:
    """Bytes of another storage type after a single watched step."""
    incident, boards = case
    pages = _pages(boards)
    for name, dtype in zip(("good", "bad"), incident.dtypes, strict=True):
        assert {value for _, value in pages[name].select("optwatch.steps")} == {1}
        sizes: Counter[str] = Counter()
        for labels, value in pages[name].select("optwatch.optimizer.state", optimizer=incident.optimizer):
            sizes[labels["dtype"]] += int(value)
        assert sizes.most_common(1)[0][0] == dtype


def test_the_gate_catches_it(
    case: tuple[Incident, Boards], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The good run passes against its own baseline, the bad one fails, and is told apart by the storage type."""
    incident, boards = case
    path = tmp_path / "baseline.json"
    assert main(["baseline", "record", str(boards["good"]), "-o", str(path)]) == 0
    document = json.loads(path.read_text())
    # The process that runs the tests grows, and steps of this size are all overhead.
    document["tolerances"] |= {"peak_memory": 1e9, "overhead": 1e9}
    path.write_text(json.dumps(document))
    assert main(["check", str(boards["good"]), "--baseline", str(path)]) == 0
    capsys.readouterr()
    assert main(["check", str(boards["bad"]), "--baseline", str(path)]) == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert any(f"/{incident.dtypes[1]}" in line and "state_bytes/" in line for line in failures)


@pytest.mark.integration
def test_an_alert_fires(case: tuple[Incident, Boards], tmp_path: Path) -> None:
    """The real series of both runs, one after the other in the same job: quiet during the first, then not."""
    incident, boards = case
    pages = _pages(boards)
    series = {
        **_series(pages["good"], "good", "{0}x9 stale"),
        **_series(pages["bad"], "bad", "_x10 {0}x60"),
    }
    firing = f'count(ALERTS{{alertname="{incident.alert}", alertstate="firing"}}) > bool 0 or vector(0)'
    checks = [
        {"expr": firing, "eval_time": f"{minute}m", "exp_samples": [{"labels": "{}", "value": value}]}
        for minute, value in ((9, 0), (15, 1), (40, 1))
    ]
    given = [{"series": name, "values": values} for name, values in series.items()]
    promtool(tmp_path, [{"interval": "1m", "input_series": given, "promql_expr_test": checks}])


def _series(page: Page, run_id: str, times: str) -> dict[str, str]:
    """Every series of bytes and what rules join them with, as a running run's."""
    named = {}
    for name, samples in page.samples.items():
        if not name.startswith(("optwatch_optimizer_state", "optwatch_parameters", "optwatch_run")):
            continue
        for labels, value in samples:
            assert labels["run_id"] == run_id
            ended = name == "optwatch_run_state"  # the boards are of runs that are over
            shown = float(labels["state"] == "running") if ended else value
            pairs = ", ".join(f'{key}="{text}"' for key, text in labels.items())
            named[f"{name}{{{pairs}}}"] = times.format(f"{shown:g}")
    return named
