"""Alerts on given series, through `promtool test rules`: when they wait, when they fire, when they keep quiet."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from alerts.cases import (
    ASKED,
    CASES,
    FOUND,
    NORM,
    PROMOTED,
    RSS,
    RUNNING,
    RUNNING_STATE,
    STATE_METRIC,
    STEPS,
    UP,
    Case,
)
from debian import program
from deploy.prometheus import rules
from deploy.prometheus.alerts import Alert

if TYPE_CHECKING:
    from collections.abc import Callable

FILE = Path(__file__).parents[2] / rules.DEFAULT_PATH
#: Between two evaluations, as shipped.
INTERVAL = yaml.safe_load(FILE.with_name("prometheus.yml").read_text(encoding="utf-8"))["global"][
    "evaluation_interval"
]


def _values(text: str) -> str:
    """Write out what promtool cannot repeat: NaN and Inf."""
    return re.sub(r"(NaN|Inf)x(\d+)", lambda found: " ".join([found[1]] * (int(found[2]) + 1)), text)


def _expectations(case: Case) -> list[dict[str, object]]:
    checks = []
    for state, counts in (("firing", case.firing), ("pending", case.pending)):
        for minute, count in counts.items():
            series = f'count(ALERTS{{alertname="{case.alert}", alertstate="{state}"}}) or vector(0)'
            samples = [{"labels": "{}", "value": count}]
            checks.append({"expr": series, "eval_time": f"{minute}m", "exp_samples": samples})
    return checks


def promtool(tmp_path: Path, tests: list[dict[str, object]], every: str = "1m") -> None:
    """One start of promtool for all of them, since reading the rules takes as long as a test."""
    file = tmp_path / "tests.yml"
    body = {"rule_files": [str(FILE)], "evaluation_interval": every, "tests": tests}
    file.write_text(yaml.safe_dump(body), encoding="utf-8")
    command = [program("promtool"), "test", "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _test(case: Case) -> dict[str, object]:
    series = [{"series": name, "values": _values(values)} for name, values in case.series.items()]
    return {"interval": "1m", "input_series": series, "promql_expr_test": _expectations(case)}


@pytest.mark.parametrize("alert", rules.ALERTS, ids=lambda alert: alert.name)
def test_alert(alert: Alert, tmp_path: Path) -> None:
    """The alert waits, fires or keeps quiet as its rows say."""
    cases = [case for case in CASES if case.alert == alert.name]
    try:
        promtool(tmp_path, [_test(case) for case in cases])
    except AssertionError:
        for case in cases:  # which one?
            try:
                promtool(tmp_path, [_test(case)])
            except AssertionError as error:
                raise AssertionError(f"{case.alert}: {case.what}") from error
        raise


def test_every_alert_fires_and_keeps_quiet_in_some_case() -> None:
    """No alert that cannot fire, and none that always does."""
    for alert in rules.ALERTS:
        cases = [case for case in CASES if case.alert == alert.name]
        assert any(any(case.firing.values()) for case in cases), alert.name
        assert any(not any(case.firing.values()) for case in cases), alert.name


def _minutes(wait: str) -> float:
    return int(wait[:-1]) * {"s": 1 / 60, "m": 1.0}[wait[-1]]


def _edge(alert: Alert) -> tuple[Case, int]:
    """A case of the alert and the minute at which it fires, neither a minute too early nor too late."""
    wait = math.ceil(_minutes(alert.wait))
    for case in CASES:
        for minute, count in case.firing.items():
            begun = case.alert == alert.name and case.pending.get(minute - wait, 0) > 0
            before = case.pending.get(minute - wait - 1, 0) + case.firing.get(minute - wait - 1, 0)
            if begun and not before and count and case.firing.get(minute - 1) == 0:
                return case, minute
    raise AssertionError(f"{alert.name}: no case looks at both ends of its wait of {alert.wait}")


every_alert = pytest.mark.parametrize("alert", rules.ALERTS, ids=lambda alert: alert.name)


@every_alert
def test_the_wait_of_every_alert_is_tried(alert: Alert) -> None:
    """Some case begins to wait at one minute, and fires after just its wait, not a minute before."""
    assert _edge(alert)


def _without_state(case: Case) -> dict[str, str]:
    return {name: values for name, values in case.series.items() if not name.startswith(STATE_METRIC)}


def _finished(case: Case, _: int) -> dict[str, str]:
    """The same, but the runs are over."""
    states = [name for name in case.series if name.startswith(STATE_METRIC)] or [RUNNING_STATE]
    ended = {name.replace("running", "finished"): "1x200" for name in states}
    return {**_without_state(case), **dict.fromkeys(states, "0x200"), **ended}


def _not_a_number(case: Case, _: int) -> dict[str, str]:
    """The same, but no value can be computed."""
    return {name: "NaNx100" if name in _without_state(case) else "1x200" for name in case.series}


def _target_gone(case: Case, minute: int) -> dict[str, str]:
    """The same, but Prometheus no longer finds the target when the alert would fire."""
    return {name: " ".join([*_expanded(values)[:minute], "stale"]) for name, values in case.series.items()}


def _expanded(values: str) -> list[str]:
    """Value by value what promtool's notation abbreviates."""
    found: list[str] = []
    for word in values.split():
        repeated = re.fullmatch(r"([\d.]+(?:e-?\d+)?|[_a-zA-Z]+)([+-][\d.]+)?x(\d+)", word)
        if not repeated:
            found.append(word)
            continue
        first, step, times = repeated.groups()
        if first == "_":
            found += ["_"] * int(times)
        elif step:
            found += [f"{float(first) + i * float(step):g}" for i in range(int(times) + 1)]
        else:
            found += [first] * (int(times) + 1)
    return found


#: What changes about a case that fires, and the alerts that fire even so.
EVEN_SO = {
    # Of devices and agents, which go on when a run is over; and what agents lost.
    _finished: {"DeviceLost", "EccErrors", "ExportFailing", "SamplesDropped"},
    # Its reason to be; what is not 1 is not up; and bytes are counted: NaN is as good as a difference.
    _not_a_number: {"NonFiniteUpdates", "RankMissing", "StateBytesUnexpected"},
    # Its reason to be; and what was counted before did happen.
    _target_gone: {"RankMissing", "EccErrors", "NonFiniteGradients", "SamplesDropped", "ExportFailing"},
}


@pytest.mark.parametrize("change", EVEN_SO, ids=lambda change: change.__name__.strip("_"))
def test_keeps_quiet(change: Callable[[Case, int], dict[str, str]], tmp_path: Path) -> None:
    """A run that is over, values that are none and a target that is gone raise no alert but those that are about it."""
    tests = []
    for alert in rules.ALERTS:
        case, minute = _edge(alert)
        fires = f'count(count_over_time(ALERTS{{alertname="{alert.name}", alertstate="firing"}}[2h])) or vector(0)'
        expected = int(alert.name in EVEN_SO[change])
        check = {"expr": fires, "eval_time": "100m", "exp_samples": [{"labels": "{}", "value": expected}]}
        changed = dataclasses.replace(case, series=change(case, minute))
        tests.append({**_test(changed), "promql_expr_test": [check]})
    promtool(tmp_path, tests)


def test_a_run_without_values_raises_nothing(tmp_path: Path) -> None:
    """What could not be read is absent, and absent is no alarm; nor is a target that Prometheus no longer sees."""
    quiet = [
        {"expr": 'ALERTS{alertname!="AgentDown"}', "eval_time": f"{m}m", "exp_samples": []}
        for m in (5, 45, 110)
    ]
    for series in ({**RUNNING, UP: "1x200"}, {STEPS: "0+60x9 stale", NORM: "1x9 stale", RSS: "1+9x9 stale"}):
        given = [{"series": name, "values": values} for name, values in series.items()]
        promtool(tmp_path, [{"interval": "1m", "input_series": given, "promql_expr_test": quiet}])


def test_minutes_can_be_shortened() -> None:
    """Windows, offsets, waits and ages alike; everything else stays."""
    for alert in rules.ALERTS:
        assert rules.clocked(alert.expr, 60) == alert.expr
        short = rules.clocked(alert.expr, 1)
        assert not re.search(r"[\[ ]\d+[mhd]\b|\* 60\b", short), short
        assert rules.clocked(alert.wait, 60) == alert.wait
    assert rules.clocked("x[5m] offset 1h > 10 * 60", 2) == "x[10s] offset 120s > 10 * 2"
    assert rules.clocked("15m", 1) == "15s"
    assert rules.clocked("30s", 6) == "3s"
    assert rules.clocked("30s", 1) == "500ms"


def test_promoted_state_is_told_at_the_third_evaluation(tmp_path: Path) -> None:
    """With the intervals of the shipped configuration: two intervals after the first scrape that shows it."""
    series = {FOUND: "100x9 stale", PROMOTED: "_x10 400x50", ASKED: "100x60", RUNNING_STATE: "1x60"}
    firing = 'count(ALERTS{alertname="StateBytesUnexpected", alertstate="firing"}) or vector(0)'
    checks = [
        {
            "expr": firing,
            "eval_time": f"{15 * (10 + later)}s",
            "exp_samples": [{"labels": "{}", "value": value}],
        }
        for later, value in ((0, 0), (1, 0), (2, 1))
    ]
    given = [{"series": name, "values": values} for name, values in series.items()]
    promtool(
        tmp_path, [{"interval": "15s", "input_series": given, "promql_expr_test": checks}], every=INTERVAL
    )


def test_texts_are_filled_in(tmp_path: Path) -> None:
    """What a person is paged with names the optimizer, run and rank."""
    series = {FOUND: "4096x20", ASKED: "1024x20", **RUNNING}
    alert = next(alert for alert in rules.ALERTS if alert.name == "StateBytesUnexpected")
    expected = {
        "exp_labels": {"severity": "critical", "run_id": "r", "rank": "0", "optimizer": "AdamW"},
        "exp_annotations": {
            "summary": alert.summary,
            "description": "AdamW of run r, rank 0, holds 4kiB of state, which is not what its constructor asked for.",
            "runbook_url": "docs/runbooks/StateBytesUnexpected.md",
        },
    }
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"alertname": alert.name, "eval_time": "5m", "exp_alerts": [expected]}],
    }
    promtool(tmp_path, [test])
