"""An hour of recorded healthy training raises no alert: what it is and how it was recorded says record.py."""

from __future__ import annotations

import lzma
from pathlib import Path

from alerts.record import FILE, SAMPLES, STEP, read_series
from alerts.test_alerts import promtool
from deploy.prometheus import rules


def _series() -> dict[str, str]:
    lines = lzma.decompress(FILE.read_bytes()).decode().splitlines()
    return dict(line.split("\t") for line in lines)


def test_no_alert_fires(tmp_path: Path) -> None:
    """None of them, at any of 240 evaluations; the series are there and move, from the first step of a run on."""
    given = [{"series": name, "values": values} for name, values in _series().items()]
    end = f"{SAMPLES * STEP}s"
    firing = {"expr": 'count_over_time(ALERTS{alertstate="firing"}[2h])', "eval_time": end, "exp_samples": []}
    steps = {
        "expr": "count(increase(optwatch_steps_total[50m]) > 100)",
        "eval_time": end,
        "exp_samples": [{"labels": "{}", "value": 3}],
    }
    promtool(
        tmp_path,
        [{"interval": f"{STEP}s", "input_series": given, "promql_expr_test": [firing, steps]}],
        every=f"{STEP}s",
    )


def test_the_recording_holds_what_the_rules_read() -> None:
    """A rule that reads a new series needs it in the recording, or says here why a healthy CPU run has none."""
    recorded = {name.split("{")[0] for name in _series()}
    elsewhere = {name for name in read_series() - recorded if "_device_" in name or "_allocator_" in name}
    assert read_series() - recorded - elsewhere == {"optwatch_otlp_failures_total"}
    assert rules.RECORDINGS
