"""The alerts. docs/alerts.md says where the thresholds come from.

An alert is one entry of `ALERTS`, a page docs/runbooks/<name>.md and a row of cases in tests/alerts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deploy.prometheus.recordings import (
    EXPECTED,
    GRADIENT_NORM,
    JOB_PER_PARAMETER,
    OPTIMIZER_STEP_MEAN,
    PER_PARAMETER,
    SATURATED,
    STATE,
    STEP_MEAN,
    UNDERFLOW,
    UPDATE_ERROR,
    UPDATE_RATIO,
    name,
)
from optwatch.codecs.base import Kind
from optwatch.rules import RULES


@dataclass(frozen=True)
class Alert:
    """One alert; `wait` is Prometheus' ``for``. The runbook is docs/runbooks/<name>.md.

    Seconds that an expression compares with are written as minutes, ``10 * 60``: see `deploy.prometheus.rules`.
    """

    name: str
    expr: str
    wait: str
    severity: Literal["critical", "warning"]
    summary: str
    description: str


#: Finished runs page nobody: conditions that only matter while a rank trains are joined to this.
RUNNING = f'and on (run_id, rank) ({name["run_state"]}{{state="running"}} == 1)'
RUN_RUNNING = f'and on (run_id) ({name["run_state"]}{{state="running"}} == 1)'
FINISHED = f'{name["run_state"]}{{state="finished"}}'

RANK = "Rank {{ $labels.rank }} of run {{ $labels.run_id }}"
OPTIMIZER = "{{ $labels.optimizer }} of run {{ $labels.run_id }}"

_NONFINITE = name["nonfinite_elements"]
_UPDATE = name["update.norm"]
_LAST_STEP = name["last_step_timestamp"]
_LAST_SAMPLE = name["last_sample_timestamp"]
_RANK_UP = name["rank_up"]
_RSS = name["host_memory.rss"]
_ALLOCATED = name["allocator.allocated"]

#: Second moments by torch's names: a zero in one of them is a division by eps.
SECOND_MOMENTS = "|".join(
    sorted({slot.name for rule in RULES.values() for slot in rule.slots if slot.kind is Kind.SECOND_MOMENT})
)


def _spike(series: str, factor: int) -> str:
    """Above so many times its median of the hour before; not in the first half hour, which has no usual value yet."""
    usual = f"quantile_over_time(0.5, {series}[1h] offset 5m)"
    return f"max_over_time({series}[5m]) > {factor} * ({usual} > 0)\nand {series} offset 30m\n{RUN_RUNNING}"


def _leak(series: str, by: str) -> str:
    """Grew by a fifth in half an hour, is still growing, and would be twice as much in three hours."""
    return (
        f"max by ({by}) ({series} > 1.2 * (min_over_time({series}[15m] offset 15m))\n"
        f"and {series} > 1.05 * min_over_time({series}[10m])\n"
        f"and predict_linear({series}[30m], 180 * 60) > 2 * {series})"
    )


def _straggler(recording: str, factor: float) -> str:
    """Above so many times the median of the ranks."""
    by = "run_id, optimizer" if "optimizer:" in recording else "run_id"
    return f"{recording} > on ({by}) group_left () ({factor} * quantile by ({by}) (0.5, {recording}))"


ALERTS = (
    Alert(
        "StateBytesUnexpected",
        f"({STATE} != {EXPECTED})\n{RUNNING}",
        "30s",  # bytes are counted, and those of a step are published together: only a resume comes in between
        "critical",
        "Optimizer state is not stored the way it was asked for",
        OPTIMIZER + ", rank {{ $labels.rank }}, holds"
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
        "QuantizationErrorHigh",
        f"({UPDATE_ERROR.record} > 0.25)\n{RUN_RUNNING}",
        "10m",
        "warning",
        "Storing the optimizer state distorts the update",
        OPTIMIZER + ", group {{ $labels.group }}: the update computed from the"
        " stored state differs from the exact one by {{ $value | humanizePercentage }} of its size.",
    ),
    Alert(
        "QuantizationErrorSpike",
        f"({UPDATE_ERROR.record} > 0.1)\nand {_spike(UPDATE_ERROR.record, 4)}",
        "1m",
        "warning",
        "Storing the optimizer state suddenly distorts the update",
        OPTIMIZER
        + ", group {{ $labels.group }}: the error of the update is {{ $value | humanizePercentage }} of its"
        " size, more than four times its median of the last hour.",
    ),
    Alert(
        "SecondMomentUnderflow",
        f'({UNDERFLOW.record}{{slot=~"{SECOND_MOMENTS}"}} > 0.001)\n{RUN_RUNNING}',
        "10m",
        "warning",
        "Second moments are stored as zero",
        OPTIMIZER
        + ", group {{ $labels.group }}: {{ $value | humanizePercentage }} of {{ $labels.slot }} is stored as"
        " zero, which makes the update of these elements as large as eps allows.",
    ),
    Alert(
        "CodecSaturated",
        f"({SATURATED.record} > 0.01)\n{RUN_RUNNING}",
        "10m",
        "warning",
        "Optimizer state is clipped to what its storage format can hold",
        OPTIMIZER
        + ", group {{ $labels.group }}: {{ $value | humanizePercentage }} of {{ $labels.slot }} is clipped.",
    ),
    Alert(
        "SkippedStepsHigh",
        f"(\n"
        f"  sum by (run_id, optimizer) (increase({name['steps_skipped']}[15m]))\n"
        f"  / sum by (run_id, optimizer) (increase({name['steps']}[15m])) > 0.05\n"
        f")\n{RUN_RUNNING}",
        "5m",
        "warning",
        "Many optimizer steps update no weight",
        OPTIMIZER + " skipped {{ $value | humanizePercentage }} of its steps in 15 minutes.",
    ),
    Alert(
        "GradientNormSpike",
        _spike(GRADIENT_NORM.record, 10),
        "1m",
        "warning",
        "The gradient is far larger than usual",
        OPTIMIZER
        + ", group {{ $labels.group }}: the norm of the gradient reached {{ $value | humanize }}, more than"
        " ten times its median of the last hour.",
    ),
    Alert(
        "UpdateRatioTooHigh",
        f"({UPDATE_RATIO.record} > 0.1)\n{RUN_RUNNING}",
        "5m",
        "warning",
        "A step changes the weights too much",
        OPTIMIZER
        + ", group {{ $labels.group }}: a step changes the weights by {{ $value | humanizePercentage }} of"
        " their norm.",
    ),
    Alert(
        "UpdateRatioTooLow",
        # Exactly zero is a learning rate of zero, or a frozen group: meant.
        f"(({UPDATE_RATIO.record} > 0) < 1e-6)\n{RUN_RUNNING}",
        "30m",
        "warning",
        "Steps hardly change the weights",
        OPTIMIZER + ", group {{ $labels.group }}: a step changes the weights by {{ $value }} of their norm.",
    ),
    Alert(
        "MemoryHeadroomLow",
        # What the driver has free, and what torch's cache holds above its peak: a full cache is no lack.
        f"(\n"
        f"  (\n"
        f"    max by (run_id, rank, gpu) ({name['allocator.reserved']} - {name['allocator.allocated_peak']})\n"
        f"    + on (gpu) group_left () max by (gpu) ({name['device.memory.free']})\n"
        f"  )\n"
        f"  / on (gpu) group_left () max by (gpu) ({name['device.memory.total']}) < 0.05\n"
        f")\n{RUNNING}",
        "5m",
        "warning",
        "A GPU has hardly any memory left",
        RANK + " left {{ $value | humanizePercentage }} of GPU {{ $labels.gpu }} free at its peak.",
    ),
    Alert(
        "MemoryLeak",
        f"(\n{_leak(_RSS, 'run_id, rank')}\nor\n{_leak(_ALLOCATED, 'run_id, rank, gpu')}\n)\n{RUNNING}",
        "15m",
        "warning",
        "The memory of a rank grows and grows",
        RANK
        + " holds {{ $value | humanize1024 }}B on {{ with $labels.gpu }}GPU {{ . }}{{ else }}its host{{ end }},"
        " and will hold twice that in three hours.",
    ),
    Alert(
        "AllocatorRetries",
        f"(sum by (run_id, rank, gpu) (increase({name['allocator.retries']}[15m])) > 5)\n{RUNNING}",
        "1m",
        "warning",
        "torch's allocator keeps flushing its cache",
        RANK
        + " flushed its cache {{ $value | humanize }} times in 15 minutes to make room on GPU {{ $labels.gpu }}.",
    ),
    Alert(
        "EccErrors",
        f'sum by (instance, gpu) (increase({name["device.ecc_errors"]}{{error="uncorrected"}}[1h])) > 0',
        "1m",
        "critical",
        "The memory of a GPU returned wrong bits",
        "GPU {{ $labels.gpu }} on {{ $labels.instance }} had {{ $value | humanize }} uncorrected ECC errors.",
    ),
    Alert(
        "StragglerRank",
        # In a synchronous run all ranks wait for the slowest: their steps take equally long, their optimizer does not.
        f"(\n  ({_straggler(STEP_MEAN.record, 1.25)})\n"
        f"  or on (run_id, rank) ({_straggler(OPTIMIZER_STEP_MEAN.record, 2)})\n)\n{RUNNING}",
        "10m",
        "warning",
        "One rank is slower than the others",
        RANK + " takes {{ $value | humanizeDuration }} where most ranks of its run take far less.",
    ),
    Alert(
        "NonFiniteUpdates",
        # `max by` would drop the NaN of one rank where another is finite: count what differs from itself instead.
        f"count by (run_id, rank, optimizer) ({_UPDATE} != {_UPDATE} or {_UPDATE} == Inf)\n"
        f"unless on (run_id, rank) ({FINISHED} == 1)",
        "1m",
        "critical",
        "Updates contain NaN or Inf",
        OPTIMIZER + ", rank {{ $labels.rank }}: the update of {{ $value }}"
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
        OPTIMIZER + ", rank {{ $labels.rank }}, received"
        " {{ $value | humanize }} gradient elements in five minutes that were NaN or infinite.",
    ),
    Alert(
        "WeightsNotMoving",
        f"(max by (run_id, rank, optimizer, group) ({name['weights_unchanged.ratio']}) > 0.99)\n{RUNNING}",
        "15m",
        "warning",
        "Updates are too small to change the stored weights",
        OPTIMIZER + ", group {{ $labels.group }}: a step leaves"
        " {{ $value | humanizePercentage }} of the weights as they were.",
    ),
    Alert(
        "TrainingStalled",
        f"(time() - max by (run_id, rank) ({_LAST_STEP}) > 10 * 60)\n{RUNNING}",
        "1m",
        "critical",
        "A rank is running but takes no steps",
        RANK + " ended its last step {{ $value | humanizeDuration }} ago.",
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
        RANK + " no longer holds its board, and did not say goodbye.",
    ),
    Alert(
        "TelemetryStale",
        f"(max by (run_id, rank) ({_LAST_STEP}) - max by (run_id, rank) ({_LAST_SAMPLE}) > 30 * 60)\n{RUNNING}",
        "5m",
        "warning",
        "Steps go on, but full statistics have stopped",
        RANK + " steps, but its newest full statistics were"
        " {{ $value | humanizeDuration }} old at its newest step.",
    ),
    Alert(
        "SamplesDropped",
        f"sum by (run_id, rank) (rate({name['samples_dropped']}[10m])) > 0.1",
        "10m",
        "warning",
        "The agent reads slower than a rank publishes",
        RANK + " loses {{ $value | humanize }} samples a second.",
    ),
    Alert(
        "DeviceLost",
        f"{name['device_up']} == 0",
        "1m",
        "critical",
        "The driver no longer answers for a GPU",
        "GPU {{ $labels.gpu }} on {{ $labels.instance }} was lost.",
    ),
    Alert(
        "ExportFailing",
        f"sum by (instance, reason) (rate({name['otlp_failures']}[5m])) > 0",
        "10m",
        "warning",
        "An agent cannot push its metrics",
        "The agent at {{ $labels.instance }} loses {{ $value | humanize }} pushes a second: {{ $labels.reason }}.",
    ),
    Alert(
        "AgentDown",
        # An agent leaves by itself after its last run: it is missed only where a run was going on when last seen.
        f'up{{job="optwatch"}} == 0\n'
        f'and on (instance) (last_over_time({name["run_state"]}{{state="running"}}[1h]) == 1)',
        "5m",
        "warning",
        "An optwatch agent cannot be scraped",
        "The agent at {{ $labels.instance }} has not answered for five minutes; nothing on its node is watched.",
    ),
)
