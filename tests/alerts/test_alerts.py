"""Alerts on given series, through `promtool test rules`: when they wait, when they fire, when they keep quiet."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from debian import program
from deploy.prometheus import rules

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.integration

FILE = Path(__file__).parents[2] / rules.DEFAULT_PATH

# Series: one value a minute from minute 0 on, in promtool's notation: "1x9" is ten ones, "_x10" ten minutes without a
# sample, "stale" ends a series.
R = 'run_id="r", rank="0"'
R1 = 'run_id="r", rank="1"'
A = f'{R}, optimizer="AdamW"'
RUNNING = {f'optwatch_run_state{{{R}, state="running"}}': "1x200"}
FINISHED = {
    f'optwatch_run_state{{{R}, state="running"}}': "0x200",
    f'optwatch_run_state{{{R}, state="finished"}}': "1x200",
}
FOUND = f'optwatch_optimizer_state_bytes{{{A}, slot="exp_avg", dtype="int8", device="cpu"}}'
PROMOTED = f'optwatch_optimizer_state_bytes{{{A}, slot="exp_avg", dtype="float32", device="cpu"}}'
ASKED = f'optwatch_optimizer_state_expected_bytes{{{A}, slot="exp_avg", dtype="int8", device="cpu"}}'
PARAMETERS = f'optwatch_parameters{{{A}, dtype="float32", device="cpu"}}'
NONFINITE = f"optwatch_nonfinite_elements_total{{{A}}}"
ERROR = f'optwatch_update_quantization_error_ratio{{{A}, group="layers 0-3"}}'
UPDATE = f'optwatch_update_norm{{{A}, group="layers 0-3"}}'
UNCHANGED = f'optwatch_weights_unchanged_ratio{{{A}, group="layers 0-3"}}'
STEP_TIME = f"optwatch_last_step_timestamp_seconds{{{R}}}"
SAMPLE_TIME = f"optwatch_last_sample_timestamp_seconds{{{R}}}"
UP = f"optwatch_rank_up{{{R}}}"
DROPPED = f"optwatch_samples_dropped_total{{{R}}}"
AGENT = 'up{job="optwatch", instance="a"}'
AGENT_RUNNING = f'optwatch_run_state{{job="optwatch", instance="a", {R}, state="running"}}'


@dataclass(frozen=True)
class Case:
    """What an alert does on given series: number of alerts firing and pending by minute."""

    alert: str
    what: str
    series: Mapping[str, str]
    firing: Mapping[int, int] = field(default_factory=dict)
    pending: Mapping[int, int] = field(default_factory=dict)


def _job(run: str, start: str) -> dict[str, str]:
    facts = 'world_size="1", local_rank="0", host="h", pid="1", replicas="1"'
    labels = f'run_id="{run}", rank="0"'
    state = f'{labels}, optimizer="AdamW", slot="exp_avg", dtype="int8", device="cpu"'
    return {
        f'optwatch_run_info{{{labels}, job_id="7", {facts}}}': start.format(1),
        f"optwatch_optimizer_state_bytes{{{state}}}": start.format(200 if run == "a" else 800),
        f'optwatch_parameters{{{labels}, optimizer="AdamW", dtype="float32", device="cpu"}}': start.format(
            100
        ),
    }


CASES = (
    Case(
        "StateBytesUnexpected", "a resume promotes int8 to fp32",
        {FOUND: "100x9 stale", PROMOTED: "_x10 400x50", ASKED: "100x60", **RUNNING},
        firing={9: 0, 10: 0, 11: 1, 40: 1}, pending={9: 0, 10: 1, 11: 0},
    ),
    Case(
        "StateBytesUnexpected", "one byte too many is too many",
        {FOUND: "1000000x9 1000001x50", ASKED: "1000000x60", **RUNNING}, firing={11: 1},
    ),
    Case(
        "StateBytesUnexpected", "state is lost",
        {FOUND: "100x9 0x50", ASKED: "100x60", **RUNNING}, firing={11: 1},
    ),
    Case(
        "StateBytesUnexpected", "found and asked for grow together",
        {FOUND: "0x9 400x50", ASKED: "0x9 400x50", **RUNNING}, firing={11: 0, 40: 0}, pending={10: 0},
    ),
    Case(
        "StateBytesUnexpected", "a difference of one scrape only",
        {FOUND: "100x9 400 100x50", ASKED: "100x60", **RUNNING}, firing={11: 0, 12: 0}, pending={10: 1, 11: 0},
    ),
    Case(
        "StateBytesUnexpected", "nothing is known about what was asked for",
        {FOUND: "400x60", **RUNNING}, firing={30: 0},
    ),
    Case("StateBytesUnexpected", "a finished run", {FOUND: "400x60", ASKED: "100x60", **FINISHED}, firing={30: 0}),
    Case(
        "StateBytesUnexpected", "only the rank that differs",
        {
            FOUND: "400x60", ASKED: "100x60", **RUNNING,
            FOUND.replace(R, R1): "100x60", ASKED.replace(R, R1): "100x60",
            f'optwatch_run_state{{{R1}, state="running"}}': "1x60",
        },
        firing={30: 1},
    ),
    Case(
        "StateBytesRegression", "grows within a run, without a known expectation",
        {FOUND: "200x9 800x50", PARAMETERS: "100x60", **RUNNING},
        firing={11: 0, 12: 1}, pending={9: 0, 10: 1, 11: 1},
    ),
    Case(
        "StateBytesRegression", "less than five percent",
        {FOUND: "200x9 209x50", PARAMETERS: "100x60", **RUNNING}, firing={30: 0}, pending={11: 0},
    ),
    Case(
        "StateBytesRegression", "layers are unfrozen: the growth was asked for",
        {FOUND: "200x9 800x50", ASKED: "200x9 800x50", PARAMETERS: "100x60", **RUNNING}, firing={30: 0},
    ),
    Case(
        "StateBytesRegression", "the first steps make the state",
        {FOUND: "0x9 800x50", PARAMETERS: "100x60", **RUNNING}, firing={12: 0, 30: 0},
    ),
    Case(
        "StateBytesRegression", "the same job comes back as another run with larger state",
        {**_job("a", "{0}x9 stale"), **_job("b", "_x20 {0}x60")}, firing={19: 0, 22: 1},
    ),
    Case("UpdateQuantizationErrorHigh", "rises", {ERROR: "0.1x4 0.3x50"}, firing={14: 0, 15: 1}, pending={5: 1, 14: 1}),
    Case("UpdateQuantizationErrorHigh", "at the threshold", {ERROR: "0.25x60"}, firing={30: 0}, pending={30: 0}),
    Case("UpdateQuantizationErrorHigh", "NaN is the other alert's", {ERROR: "NaNx60"}, firing={30: 0}),
    Case("NonFiniteUpdates", "NaN", {UPDATE: "1x9 NaNx50"}, firing={10: 0, 11: 1}, pending={9: 0, 10: 1}),
    Case("NonFiniteUpdates", "Inf", {UPDATE: "1x9 Infx50"}, firing={11: 1}),
    Case("NonFiniteUpdates", "one rank of two", {UPDATE: "NaNx50", UPDATE.replace(R, R1): "1x50"}, firing={11: 1}),
    Case("NonFiniteUpdates", "finite, large and zero", {UPDATE: "1e300x9 0x50"}, firing={5: 0, 20: 0}),
    Case("NonFiniteUpdates", "a finished run", {UPDATE: "NaNx60", **FINISHED}, firing={30: 0}),
    Case(
        "NonFiniteGradients", "a burst",
        {NONFINITE: "0x9 5x50", **RUNNING}, firing={10: 0, 11: 1, 20: 0}, pending={9: 0, 10: 1, 20: 0},
    ),
    Case("NonFiniteGradients", "there when first seen", {NONFINITE: "_x10 5x50", **RUNNING}, firing={11: 1, 20: 0}),
    Case("NonFiniteGradients", "the counter starts again", {NONFINITE: "5x9 0x50", **RUNNING}, firing={11: 0, 30: 0}),
    Case("NonFiniteGradients", "a finished run", {NONFINITE: "0x9 5x50", **FINISHED}, firing={11: 0}),
    Case("WeightsNotMoving", "bf16 weights", {UNCHANGED: "0.995x60", **RUNNING}, firing={14: 0, 15: 1}),
    Case("WeightsNotMoving", "most of them move", {UNCHANGED: "0.9x60", **RUNNING}, firing={30: 0}),
    Case("WeightsNotMoving", "not measured", {UNCHANGED: "NaNx60", **RUNNING}, firing={30: 0}),
    Case("WeightsNotMoving", "a finished run", {UNCHANGED: "1x60", **FINISHED}, firing={30: 0}),
    Case(
        "TrainingStalled", "no step for ten minutes",
        {STEP_TIME: "0+60x9 540x50", **RUNNING}, firing={20: 0, 21: 1}, pending={19: 0, 20: 1},
    ),
    Case("TrainingStalled", "a step a minute", {STEP_TIME: "0+60x60", **RUNNING}, firing={30: 0}),
    Case("TrainingStalled", "a finished run", {STEP_TIME: "0x60", **FINISHED}, firing={30: 0}),
    Case("RankMissing", "killed", {UP: "1x9 0x4 stale", **RUNNING}, firing={11: 0, 12: 1, 30: 1}, pending={10: 1}),
    Case("RankMissing", "the node vanishes", {UP: "1x9 stale"}, firing={11: 0, 12: 1, 30: 1, 80: 0}),
    Case("RankMissing", "finished", {UP: "1x9 0x4 stale", **FINISHED}, firing={12: 0, 30: 0}),
    Case(
        "RankMissing", "finished, and its series ended",
        {
            UP: "1x9 0x4 stale",
            f'optwatch_run_state{{{R}, state="finished"}}': "0x9 1x4 stale",
        },
        firing={12: 0, 30: 0},
    ),
    Case(
        "RankMissing", "another agent takes over",
        {f'optwatch_rank_up{{instance="a", {R}}}': "1x9 stale", f'optwatch_rank_up{{instance="b", {R}}}': "_x11 1x50"},
        firing={12: 0, 30: 0},
    ),
    Case(
        "TelemetryStale", "steps without full statistics",
        {STEP_TIME: "0+60x90", SAMPLE_TIME: "0+60x9 540x90", **RUNNING},
        firing={44: 0, 45: 1}, pending={39: 0, 40: 1},
    ),
    Case("TelemetryStale", "both stand still", {STEP_TIME: "540x90", SAMPLE_TIME: "540x90", **RUNNING}, firing={80: 0}),
    Case("TelemetryStale", "statistics are off", {STEP_TIME: "0+60x90", **RUNNING}, firing={80: 0}),
    Case("SamplesDropped", "one a second", {DROPPED: "0+60x60"}, firing={9: 0, 20: 1}),
    Case("SamplesDropped", "one a minute", {DROPPED: "0+1x60"}, firing={30: 0}),
    Case("DeviceLost", "lost", {'optwatch_device_up{gpu="GPU-1"}': "1x9 0x50"}, firing={10: 0, 11: 1}, pending={10: 1}),
    Case("DeviceLost", "no GPU", {UP: "1x60"}, firing={30: 0}),
    Case(
        "AgentDown", "while a rank was running",
        {AGENT: "1x9 0x90", AGENT_RUNNING: "1x9 stale"}, firing={14: 0, 15: 1}, pending={9: 0, 10: 1},
    ),
    Case("AgentDown", "left after its last run", {AGENT: "1x9 0x90", AGENT_RUNNING: "1x4 0x4 stale"}, firing={15: 0}),
    Case(
        "AgentDown", "the target of another job",
        {AGENT.replace("optwatch", "node"): "0x90", AGENT_RUNNING: "1x9"}, firing={15: 0},
    ),
)  # fmt: skip


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


def promtool(tmp_path: Path, tests: list[dict[str, object]]) -> None:
    file = tmp_path / "tests.yml"
    body = {"rule_files": [str(FILE)], "evaluation_interval": "1m", "tests": tests}
    file.write_text(yaml.safe_dump(body), encoding="utf-8")
    command = [program("promtool"), "test", "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.alert}: {case.what}")
def test_alert(case: Case, tmp_path: Path) -> None:
    """The alert waits, fires or keeps quiet as the row says."""
    series = [{"series": name, "values": _values(values)} for name, values in case.series.items()]
    promtool(tmp_path, [{"interval": "1m", "input_series": series, "promql_expr_test": _expectations(case)}])


def test_every_alert_fires_and_keeps_quiet_in_some_case() -> None:
    """No alert that cannot fire, and none that always does."""
    for alert in rules.ALERTS:
        cases = [case for case in CASES if case.alert == alert.name]
        assert any(any(case.firing.values()) for case in cases), alert.name
        assert any(not any(case.firing.values()) for case in cases), alert.name


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
