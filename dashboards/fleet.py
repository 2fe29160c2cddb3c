"""The dashboard "optwatch fleet": all runs, their ranks, hosts and GPUs, from recorded series where there are many."""

from __future__ import annotations

from dashboards.board import Board
from dashboards.panels import Link, Panel, Query, Row
from dashboards.queries import (
    CHOSEN_RUNS,
    ERROR,
    devices,
    node,
    recorded,
    series,
)
from deploy.prometheus import recordings
from deploy.prometheus.alerts import ALERTS

NO_GPU = "no GPU"
RUNS = f'{CHOSEN_RUNS}, rank=~"$rank"'
_NAMES = "|".join(alert.name for alert in ALERTS)
_ALERTS = f'count by (alertname, alertstate, run_id) (ALERTS{{alertname=~"{_NAMES}"}})'
_STEP = recorded(recordings.STEP_MEAN.record, RUNS)
_OPTIMIZER_STEP = recorded(recordings.OPTIMIZER_STEP_MEAN.record, RUNS)


def _open(run: str) -> tuple[Link, ...]:
    """Links to the dashboards about one run, with what is chosen here."""
    kept = "${__url_time_range}&${datasource:queryparam}&${job:queryparam}"
    return tuple(
        Link(f"Open {name} of this run", f"/d/optwatch-{name}?{kept}&var-run={run}")
        for name in ("optimizer", "memory")
    )


OPEN = _open("${__field.labels.run_id}")

RUN_ROW = Row(
    "Runs",
    (
        Panel(
            "Ranks of all runs by state",
            "short",
            "How many ranks are running, finished, failed or lost. Good: none lost, none failed; else see RankMissing.",
            [Query(f"sum by (state) ({series('run_state', RUNS)}) > 0", "{{state}}")],
            kind="stat",
            width=8,
            height=7,
        ),
        Panel(
            "Alerts",
            "string",
            "Alerts that wait or fire, and the run that each is about. Good: none; else open the page of that"
            " name in docs/runbooks, which says what to look at and what to do.",
            [Query(_ALERTS, "")],
            kind="table",
            width=16,
            height=7,
            no_value="none",
            links=_open("${__data.fields.run_id}"),
        ),
        Panel(
            "Steps a second by run",
            "suffix: /s",
            "The slowest rank of each run. Good: constant over a run; else compare its ranks below.",
            [Query(f"min by (run_id) (1 / {_STEP})", "{{run_id}}")],
            minimum=0,
            links=OPEN,
        ),
        Panel(
            "Age of the last step by run",
            "s",
            "Time since the slowest rank ended a step. Good: a sawtooth of one step; else, where it rises without"
            " end, the run is finished or stalled: see TrainingStalled.",
            [Query(f"time() - min by (run_id) ({series('last_step_timestamp', RUNS)})", "{{run_id}}")],
            minimum=0,
            links=OPEN,
        ),
        Panel(
            "Loss by run",
            "none",
            "Mean over the ranks, as the training loops reported it. Good: falling; else open the run, and look"
            " what moved first.",
            [Query(f"avg by (run_id) ({series('loss', RUNS)})", "{{run_id}}")],
            no_value="not reported",
            links=OPEN,
        ),
        Panel(
            "State found minus asked for, by run",
            "bytes",
            "Good: exactly 0; else state is not stored the way it was asked for: see StateBytesUnexpected.",
            [
                Query(
                    f"sum by (run_id, optimizer) ({recorded(recordings.STATE, RUNS)})"
                    f" - sum by (run_id, optimizer) ({recorded(recordings.EXPECTED, RUNS)})",
                    "{{run_id}} {{optimizer}}",
                )
            ],
            links=OPEN,
        ),
        Panel(
            "State a parameter by run",
            "suffix: B",
            "Bytes of optimizer state a parameter, the largest of the ranks. Good: 8 for fp32 AdamW, 4 for bf16,"
            " about 2.05 for int8; else the run lost its format: see StateBytesUnexpected.",
            [
                Query(
                    f"max by (run_id, optimizer) ({recorded(recordings.PER_PARAMETER, RUNS)})",
                    "{{run_id}} {{optimizer}}",
                )
            ],
            minimum=0,
            links=OPEN,
        ),
        Panel(
            "Update error by run",
            "percentunit",
            "From storing the state, the worst group of each run. Good: below 10 %; else, above 25 %, training"
            " suffers: see QuantizationErrorHigh.",
            [
                Query(
                    f"max by (run_id, optimizer) ({recorded(recordings.UPDATE_ERROR.record, CHOSEN_RUNS)})",
                    "{{run_id}} {{optimizer}}",
                )
            ],
            log=True,
            steps=ERROR,
            links=OPEN,
        ),
    ),
)

RANKS = Row(
    "Ranks",
    (
        Panel(
            "Mean step by rank",
            "s",
            "Over five minutes. Good: lines of a run on top of each other; else a rank above them holds the"
            " others back: see StragglerRank.",
            [Query(_STEP, "{{run_id}} rank {{rank}}")],
            minimum=0,
            links=OPEN,
        ),
        Panel(
            "Slowest rank against the median",
            "none",
            "Mean step and mean optimizer step of the slowest rank over the median of its run. Good: near 1;"
            " else, above 1.25 and 2, see StragglerRank.",
            [
                Query(f"max by (run_id) ({_STEP}) / quantile by (run_id) (0.5, {_STEP})", "{{run_id}} step"),
                Query(
                    f"max by (run_id) ({_OPTIMIZER_STEP}) / quantile by (run_id) (0.5, {_OPTIMIZER_STEP})",
                    "{{run_id}} optimizer",
                ),
            ],
            minimum=0,
            links=OPEN,
        ),
        Panel(
            "Steps behind the first rank",
            "short",
            "Good: 0 or 1; else a rank is stalled, or its telemetry is: see TelemetryStale.",
            [
                Query(
                    f"max by (run_id) ({series('step', RUNS)}) - min by (run_id) ({series('step', RUNS)})",
                    "{{run_id}}",
                )
            ],
            minimum=0,
            links=OPEN,
        ),
        Panel(
            "Ranks and hosts",
            "string",
            "Facts about each rank. Good: every rank of the world is listed once; else see RankMissing.",
            [Query(series("run", RUNS), "")],
            kind="table",
            width=24,
            height=6,
        ),
        Panel(
            "Optimizers",
            "string",
            "What was asked for. Good: the codec you meant, on a compiled backend; else change the constructor's"
            " `state=`, or read the run's first warning about the backend.",
            [Query(series("optimizer", RUNS), "")],
            kind="table",
            width=24,
            height=6,
        ),
    ),
)

DEVICES = Row(
    "GPUs of the runs",
    (
        Panel(
            "Device utilisation",
            "percentunit",
            "Part of the time in which a kernel ran. Good: near 100 %; else look for data loading or"
            " communication in the gaps.",
            [devices("device.utilization.ratio", matchers=RUNS)],
            minimum=0,
            no_value=NO_GPU,
        ),
        Panel(
            "Device power",
            "watt",
            "Power drawn, and the mean from the energy counter. Good: near the limit while training; else a GPU"
            " far below the others waits for them, or is throttled: look at the panels beside.",
            [
                devices("device.power", matchers=RUNS),
                devices("device.energy", "{{gpu}} mean", rate=True, matchers=RUNS),
            ],
            minimum=0,
            no_value=NO_GPU,
        ),
        Panel(
            "Device temperature",
            "celsius",
            "Good: steady, and no throttling beside it; else look at the cooling of the host.",
            [devices("device.temperature", matchers=RUNS)],
            no_value=NO_GPU,
        ),
        Panel(
            "Clocks held down",
            "none",
            "1 while the driver holds the clock down for the reason. Good: 0, or the power limit only; else look"
            " at the cooling and the power supply of the host.",
            [devices("device.clock_throttled", "{{gpu}} {{reason}}", matchers=RUNS)],
            minimum=0,
            width=12,
            no_value=NO_GPU,
        ),
        Panel(
            "Device faults",
            "short",
            "Whether the device answers, its ECC and XID errors. Good: up 1, none uncorrected, no XID; else drain"
            " the host: see DeviceLost and EccErrors.",
            [
                devices("device_up", "up {{gpu}}", matchers=RUNS),
                devices("device.ecc_errors", "ECC {{error}} {{gpu}}", matchers=RUNS),
                devices("device.xid_errors", "XID errors {{gpu}}", matchers=RUNS),
                devices("device_xid", "XID {{xid}} {{gpu}}", matchers=RUNS),
            ],
            minimum=0,
            width=12,
            no_value=NO_GPU,
        ),
        Panel(
            "Devices",
            "string",
            "UUID, model and driver of each GPU. Good: the same model and driver everywhere; else the slowest of"
            " them sets the pace.",
            [Query(node("device", matchers=RUNS), "")],
            kind="table",
            width=24,
            height=6,
            no_value=NO_GPU,
        ),
    ),
)

BOARD = Board(
    "fleet",
    "All runs: how they go, which rank holds its run back, and what the GPUs say.",
    (RUN_ROW, RANKS, DEVICES),
    shown=("job", "run", "rank"),
    many_runs=True,
)
