"""What panels compute: their very queries on given series, through `promtool test rules`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from alerts.test_alerts import promtool

BOARDS = Path(__file__).parents[2] / "optwatch" / "dashboards"
MINUTES = 10  # after so many a query is asked; there is a value a minute
FILLED = {"$__rate_interval": "5m", "$__range": f"{MINUTES}m", "$run": "r", "$job": "optwatch"}
FILLED |= {f"${name}": ".+" for name in ("optimizer", "group", "rank")}

R0, R1, R2 = (f'run_id="r", rank="{rank}"' for rank in range(3))
ADAMW = 'optimizer="AdamW"'
STATE = f'{ADAMW}, slot="exp_avg", dtype="int8", device="cpu"'
OTHER_RUN = 'run_id="another", rank="0"'


@dataclass(frozen=True)
class Case:
    """A panel, its query, series in promtool's notation, and what comes out, by labels."""

    board: str
    title: str
    series: dict[str, str]
    expected: dict[str, float]
    query: str = "A"


def _both(name: str, first: str, second: str, labels: str = "") -> dict[str, str]:
    """A series of two ranks, and one of a run that nobody asked about."""
    ranks = ((R0, first), (R1, second), (OTHER_RUN, "7+7x10"))
    return {f"optwatch_{name}{{{ranks}{', ' + labels if labels else ''}}}": values for ranks, values in ranks}


CASES = (
    Case(
        "optimizer", "Ranks by state",
        {**_both("run_state", "1x10", "1x10", 'state="running"'), **_both("run_state", "0x10", "0x10", 'state="lost"')},
        {'{state="running"}': 2},
    ),
    Case("optimizer", "Steps a second", _both("steps_total", "0+60x10", "0+30x10", ADAMW), {"{}": 0.5}),
    Case(
        "optimizer", "Age of the last step",
        _both("last_step_timestamp_seconds", "590x10", "540x10"), {"{}": 60},
    ),
    Case(
        "optimizer", "Non-finite gradients",
        _both("nonfinite_elements_total", "0+6x10", "0+3x10", ADAMW), {"{}": 90},
    ),
    Case(
        "optimizer", "State difference",
        {
            **_both("optimizer_state_bytes", "400x10", "100x10", STATE),
            **_both("optimizer_state_expected_bytes", "100x10", "100x10", STATE),
        },
        {"{}": 300},
    ),
    Case(
        "optimizer", "State a parameter",
        {
            **_both("optimizer_state_bytes", "200x10", "210x10", STATE),
            **_both("parameters", "100x10", "100x10", f'{ADAMW}, dtype="float32", device="cpu"'),
        },
        {"{}": 2.05},
    ),
    Case(
        "optimizer", "Optimizer step",
        {
            **_both("optimizer_step_duration_seconds_bucket", "0+30x10", "0+30x10", f'{ADAMW}, le="0.1"'),
            **_both("optimizer_step_duration_seconds_bucket", "0+60x10", "0+60x10", f'{ADAMW}, le="0.2"'),
            **_both("optimizer_step_duration_seconds_bucket", "0+60x10", "0+60x10", f'{ADAMW}, le="+Inf"'),
        },
        {"{}": 0.19}, query="B",
    ),
    Case(
        "optimizer", "Share of the optimizer in the step",
        {
            **_both("optimizer_step_duration_seconds_sum", "0+6x10", "0+12x10", ADAMW),
            **_both("step_duration_seconds_sum", "0+60x10", "0+60x10"),
        },
        {'{rank="0"}': 0.1, '{rank="1"}': 0.2},
    ),
    Case(
        "optimizer", "Tokens and samples a second",
        _both("training_tokens_total", "0+600x10", "0+600x10"), {"{}": 20},
    ),
    Case(
        "optimizer", "Left by clipping",
        _both("gradient_clip_ratio", "0.5x10", "1x10", ADAMW), {"{" + ADAMW + "}": 0.5},
    ),
    Case(
        "optimizer", "Update over weight",
        _both("update_to_parameter_ratio", "0.01x10", "0.03x10", f'{ADAMW}, group="a"'),
        {"{" + ADAMW + ', group="a"}': 0.03},
    ),
    Case(
        "memory", "Resident host memory in an hour",
        _both("host_memory_rss_bytes", "1000+10x10", "1000x10"), {'{rank="0"}': 1700, '{rank="1"}': 1000},
    ),
    Case(
        "memory", "Fragmentation",
        {
            **_both("allocator_inactive_split_bytes", "20x10", "0x10", 'gpu="GPU-0"'),
            **_both("allocator_reserved_bytes", "100x10", "100x10", 'gpu="GPU-0"'),
        },
        {'{rank="0"}': 0.2, '{rank="1"}': 0},
    ),
    Case(
        "memory", "Device memory free",
        {
            f'optwatch_rank_up{{{R0}, instance="a", job="optwatch"}}': "1x10",
            'optwatch_device_memory_free_bytes{gpu="GPU-0", instance="a", job="optwatch"}': "25x10",
            'optwatch_device_memory_total_bytes{gpu="GPU-0", instance="a", job="optwatch"}': "100x10",
            # The node of another run.
            f'optwatch_rank_up{{{OTHER_RUN}, instance="b", job="optwatch"}}': "1x10",
            'optwatch_device_memory_free_bytes{gpu="GPU-1", instance="b", job="optwatch"}': "1x10",
            'optwatch_device_memory_total_bytes{gpu="GPU-1", instance="b", job="optwatch"}': "100x10",
        },
        {'{gpu="GPU-0", instance="a", job="optwatch"}': 0.25},
    ),
    Case(
        "fleet", "Slowest rank against the median",
        {
            f"optwatch_step_duration_seconds_{part}{{{rank}}}": f"0+{each}x10"
            for rank, seconds in ((R0, 60), (R1, 60), (R2, 120))
            for part, each in (("sum", seconds), ("count", 60))
        },
        {'{run_id="r"}': 2},
    ),
    Case("fleet", "Steps behind the first rank", _both("step", "100x10", "97x10"), {'{run_id="r"}': 3}),
    Case(
        "monitor", "Agents that answer",
        {
            'up{job="optwatch", instance="a"}': "1x10",
            'optwatch_build_info{job="optwatch", instance="a", version="1", python="3"}': "1x10",
            'up{job="optwatch", instance="b"}': "0x10",
            'up{job="node", instance="a"}': "1x10",
            # One that pushes.
            'optwatch_build_info{job="optwatch", instance="c", version="1", python="3"}': "1x10",
        },
        {"{}": 2},
    ),
    Case(
        "monitor", "Age of the full statistics",
        {
            **_both("last_step_timestamp_seconds", "590x10", "590x10"),
            **_both("last_sample_timestamp_seconds", "500x10", "590x10"),
        },
        {'{run_id="r", rank="0"}': 90, '{run_id="r", rank="1"}': 0},
    ),
)  # fmt: skip


def _query(case: Case) -> str:
    board = json.loads((BOARDS / f"{case.board}.json").read_text(encoding="utf-8"))
    (panel,) = (panel for panel in board["panels"] if panel["title"] == case.title)
    (expr,) = (target["expr"] for target in panel["targets"] if target["refId"] == case.query)
    for placeholder, value in FILLED.items():
        expr = expr.replace(placeholder, value)
    return expr


def test_values(tmp_path: Path) -> None:
    """Sums over ranks, the worst of them, rates, quantiles, shares and joins, of the chosen run alone."""
    tests = []
    for case in CASES:
        check = {
            # A message about an expression says which panel it is of.
            "expr": f"({_query(case)}) # {case.board}: {case.title}",
            "eval_time": f"{MINUTES}m",
            "exp_samples": [{"labels": labels, "value": value} for labels, value in case.expected.items()],
        }
        series = [{"series": name, "values": values} for name, values in case.series.items()]
        tests.append({"interval": "1m", "input_series": series, "promql_expr_test": [check]})
    promtool(tmp_path, tests)
