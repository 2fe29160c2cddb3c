"""Write the recording and alert rules: ``python -m deploy.prometheus.rules [PATH]``.

An alert is one entry of `ALERTS`, a page docs/runbooks/<name>.md and a row of cases in tests/rules.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from optwatch.metrics.catalogue import CATALOGUE

DEFAULT_PATH = Path("deploy/prometheus/optwatch.rules.yml")

#: Where the pages behind an alert are found; put your own address here if you host them elsewhere.
RUNBOOKS = "docs/runbooks"

_name = {name.removeprefix("optwatch."): spec.prometheus for name, spec in CATALOGUE.items()}

#: Finished runs page nobody: conditions that only matter while a rank trains are joined to this.
RUNNING = f'and on (run_id, rank) ({_name["run_state"]}{{state="running"}} == 1)'
FINISHED = f'{_name["run_state"]}{{state="finished"}}'

STATE = "run_rank_optimizer:optwatch_optimizer_state_bytes:sum"
EXPECTED = "run_rank_optimizer:optwatch_optimizer_state_expected_bytes:sum"
PER_PARAMETER = "run_rank_optimizer:optwatch_optimizer_state_bytes_per_parameter:ratio"
JOB_PER_PARAMETER = "job_optimizer:optwatch_optimizer_state_bytes_per_parameter:max"
UPDATE_ERROR = "run_optimizer_group:optwatch_update_quantization_error_ratio:max"


@dataclass(frozen=True)
class Recording:
    """A series that is computed once and read by alerts and panels; its name lists the labels that it keeps."""

    record: str
    expr: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Alert:
    """One alert; `wait` is Prometheus' ``for``. The runbook is docs/runbooks/<name>.md."""

    name: str
    expr: str
    wait: str
    severity: Literal["critical", "warning"]
    summary: str
    description: str


RECORDINGS = (
    Recording(
        STATE,
        f"sum by (run_id, rank, optimizer) ({_name['optimizer.state']})",
        ("run_id", "rank", "optimizer"),
    ),
    Recording(
        EXPECTED,
        f"sum by (run_id, rank, optimizer) ({_name['optimizer.state_expected']})",
        ("run_id", "rank", "optimizer"),
    ),
    # Above zero only: before the first step there is no state, and "grew from nothing" is no regression.
    Recording(
        PER_PARAMETER,
        f"({STATE} > 0) / sum by (run_id, rank, optimizer) ({_name['parameters']})",
        ("run_id", "rank", "optimizer"),
    ),
    # A resumed job is a new run under the same scheduler's job: this series survives the restart.
    Recording(
        JOB_PER_PARAMETER,
        "max by (job_id, optimizer) (\n"
        f"  {PER_PARAMETER}\n"
        f'  * on (run_id, rank) group_left (job_id) max by (run_id, rank, job_id) ({_name["run"]}{{job_id!=""}})\n'
        ")",
        ("job_id", "optimizer"),
    ),
    Recording(
        UPDATE_ERROR,
        f"max by (run_id, optimizer, group) ({_name['update_quantization_error.ratio']})",
        ("run_id", "optimizer", "group"),
    ),
)

_NONFINITE = _name["nonfinite_elements"]
_UPDATE = _name["update.norm"]
_UNCHANGED = _name["weights_unchanged.ratio"]
_LAST_STEP = _name["last_step_timestamp"]
_LAST_SAMPLE = _name["last_sample_timestamp"]
_RANK_UP = _name["rank_up"]

ALERTS = (
    Alert(
        "StateBytesUnexpected",
        f"({STATE} != {EXPECTED})\n{RUNNING}",
        "1m",
        "critical",
        "Optimizer state is not stored the way it was asked for",
        "{{ $labels.optimizer }} of run {{ $labels.run_id }}, rank {{ $labels.rank }}, holds"
        " {{ $value | humanize1024 }}B of state, which is not what its constructor asked for.",
    ),
    Alert(
        "StateBytesRegression",
        f"(\n"
        f"  ({PER_PARAMETER} > 1.05 * min_over_time({PER_PARAMETER}[6h]))\n"
        # Layers unfrozen in the middle of a run raise both sums: the growth was asked for.
        f"  unless on (run_id, rank, optimizer) ({STATE} == {EXPECTED})\n"
        f"  {RUNNING}\n"
        f")\n"
        f"or\n"
        f"({JOB_PER_PARAMETER} > 1.05 * min_over_time({JOB_PER_PARAMETER}[7d]))",
        "2m",
        "warning",
        "Optimizer state takes more bytes a parameter than before",
        "{{ $labels.optimizer }} of {{ with $labels.run_id }}run {{ . }}{{ else }}job {{ $labels.job_id }}{{ end }}"
        " now takes {{ $value | humanize }} bytes of state a parameter, over 5 % more than it has taken before.",
    ),
    Alert(
        "UpdateQuantizationErrorHigh",
        f"{UPDATE_ERROR} > 0.25",
        "10m",
        "warning",
        "Storing the optimizer state distorts the update",
        "{{ $labels.optimizer }} of run {{ $labels.run_id }}, group {{ $labels.group }}: the update computed from the"
        " stored state differs from the exact one by {{ $value | humanizePercentage }} of its size.",
    ),
    Alert(
        "NonFiniteUpdates",
        # `max by` would drop the NaN of one rank where another is finite: count what differs from itself instead.
        f"count by (run_id, rank, optimizer) ({_UPDATE} != {_UPDATE} or {_UPDATE} == Inf)\n"
        f"unless on (run_id, rank) ({FINISHED} == 1)",
        "1m",
        "critical",
        "Updates contain NaN or Inf",
        "{{ $labels.optimizer }} of run {{ $labels.run_id }}, rank {{ $labels.rank }}: the update of {{ $value }}"
        " groups of tensors is not finite. Their moments, and probably their weights, are lost.",
    ),
    Alert(
        "NonFiniteGradients",
        f"(\n"
        f"  sum by (run_id, rank, optimizer) (increase({_NONFINITE}[5m])) > 0\n"
        # increase() needs two samples: a counter that is above zero when first seen counts too.
        f"  or sum by (run_id, rank, optimizer) ({_NONFINITE} unless {_NONFINITE} offset 5m) > 0\n"
        f")\n"
        f"unless on (run_id, rank) ({FINISHED} == 1)",
        "1m",
        "warning",
        "Gradients contain NaN or Inf",
        "{{ $labels.optimizer }} of run {{ $labels.run_id }}, rank {{ $labels.rank }}, received"
        " {{ $value | humanize }} gradient elements in five minutes that were NaN or infinite.",
    ),
    Alert(
        "WeightsNotMoving",
        f"(max by (run_id, rank, optimizer, group) ({_UNCHANGED}) > 0.99)\n{RUNNING}",
        "15m",
        "warning",
        "Updates are too small to change the stored weights",
        "{{ $labels.optimizer }} of run {{ $labels.run_id }}, group {{ $labels.group }}: a step leaves"
        " {{ $value | humanizePercentage }} of the weights as they were.",
    ),
    Alert(
        "TrainingStalled",
        f"(time() - max by (run_id, rank) ({_LAST_STEP}) > 600)\n{RUNNING}",
        "1m",
        "critical",
        "A rank is running but takes no steps",
        "Rank {{ $labels.rank }} of run {{ $labels.run_id }} ended its last step"
        " {{ $value | humanizeDuration }} ago.",
    ),
    Alert(
        "RankMissing",
        # As last seen within the hour: a node that vanished, agent and all, has left no fresh series behind.
        f"max by (run_id, rank) (last_over_time({_RANK_UP}[1h]))\n"
        f"unless on (run_id, rank) ({_RANK_UP} == 1)\n"
        f"unless on (run_id, rank) (last_over_time({FINISHED}[1h]) == 1)",
        "2m",
        "critical",
        "A rank died or vanished before its run was finished",
        "Rank {{ $labels.rank }} of run {{ $labels.run_id }} no longer holds its board, and did not say goodbye.",
    ),
    Alert(
        "TelemetryStale",
        f"(max by (run_id, rank) ({_LAST_STEP}) - max by (run_id, rank) ({_LAST_SAMPLE}) > 1800)\n{RUNNING}",
        "5m",
        "warning",
        "Steps go on, but full statistics have stopped",
        "Rank {{ $labels.rank }} of run {{ $labels.run_id }} steps, but its newest full statistics were"
        " {{ $value | humanizeDuration }} old at its newest step.",
    ),
    Alert(
        "SamplesDropped",
        f"sum by (run_id, rank) (rate({_name['samples_dropped']}[10m])) > 0.1",
        "10m",
        "warning",
        "The agent reads slower than a rank publishes",
        "Rank {{ $labels.rank }} of run {{ $labels.run_id }} loses {{ $value | humanize }} samples a second.",
    ),
    Alert(
        "DeviceLost",
        f"{_name['device_up']} == 0",
        "1m",
        "critical",
        "The driver no longer answers for a GPU",
        "GPU {{ $labels.gpu }} on {{ $labels.instance }} was lost.",
    ),
    Alert(
        "AgentDown",
        # An agent leaves by itself after its last run: it is missed only where a run was going on when last seen.
        f'up{{job="optwatch"}} == 0\n'
        f'and on (instance) (last_over_time({_name["run_state"]}{{state="running"}}[1h]) == 1)',
        "5m",
        "warning",
        "An optwatch agent cannot be scraped",
        "The agent at {{ $labels.instance }} has not answered for five minutes; nothing on its node is watched.",
    ),
)


class _Dumper(yaml.SafeDumper):
    """Writes strings of several lines as blocks, so that a reader sees the expression."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _alert(alert: Alert) -> dict[str, object]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": alert.wait,
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": alert.summary,
            "description": alert.description,
            "runbook_url": f"{RUNBOOKS}/{alert.name}.md",
        },
    }


def generate() -> str:
    """Return the text of the rule file."""
    # One group: Prometheus evaluates the rules of a group in order, so alerts read what was recorded just before.
    recordings = [{"record": rule.record, "expr": rule.expr} for rule in RECORDINGS]
    groups = [{"name": "optwatch", "rules": [*recordings, *map(_alert, ALERTS)]}]
    head = "# Made from deploy/prometheus/rules.py by `make generate`; do not edit.\n"
    return head + yaml.dump(
        {"groups": groups}, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True
    )


def main() -> None:
    """Write the rules to the path given on the command line, by default where they are committed."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_PATH
    path.write_text(generate(), encoding="utf-8")


if __name__ == "__main__":
    main()
