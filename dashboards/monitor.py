"""The dashboard "optwatch monitor": the agents, and what watching costs."""

from __future__ import annotations

from dashboards.board import Board
from dashboards.panels import Panel, Query, Row
from dashboards.queries import (
    ANY_JOB,
    CHOSEN_RUNS,
    GREEN_ABOVE_ZERO_RED,
    growth,
    rate,
    series,
    total,
)

RUNS = f'{CHOSEN_RUNS}, rank=~"$rank"'

#: Prometheus knows whom it scrapes; whoever pushes is there for as long as it does.
_AGENTS = f"up{{{ANY_JOB}}} or on (job, instance) {series('build', ANY_JOB)}"

OVERVIEW = Row(
    "Overview",
    (
        Panel(
            "Agents that answer",
            "none",
            "Agents that Prometheus scrapes, of all it knows; and those that push. Good: all; else see AgentDown.",
            [Query(f"sum ({_AGENTS})", "answer"), Query(f"count ({_AGENTS})", "known")],
            kind="stat",
            width=6,
            height=4,
        ),
        Panel(
            "Ranks watched",
            "none",
            "Living ranks of the runs chosen. Good: the world sizes of the runs, added up; else see RankMissing.",
            [Query(f"sum ({series('rank_up', RUNS)})", "ranks")],
            kind="stat",
            width=6,
            height=4,
        ),
        Panel(
            "Dropped, skipped, failed",
            "short",
            "In the time shown: samples overwritten before they were read, series over the cap, boards that could not"
            " be read, driver calls that failed. Good: 0; else the panels below say where.",
            [
                growth("samples_dropped", RUNS, "samples"),
                growth("series_dropped", RUNS, "series"),
                growth("boards_skipped", ANY_JOB, "boards"),
                growth("nvml_errors", ANY_JOB, "driver calls"),
            ],
            kind="stat",
            steps=GREEN_ABOVE_ZERO_RED,
            decimals=0,
            width=12,
            height=4,
        ),
    ),
)

COST = Row(
    "What watching costs",
    (
        Panel(
            "Overhead of watching",
            "percentunit",
            "Time that watching takes from the training process. Good: below 0.1 %; else raise `every`.",
            [rate("overhead", "run_id", "rank", matchers=RUNS, legend="{{run_id}} rank {{rank}}")],
            minimum=0,
        ),
        Panel(
            "Age of the full statistics",
            "s",
            "How old the newest full statistics were at the newest step. Good: no more than `every` steps; else"
            " they have stopped: see TelemetryStale.",
            [
                Query(
                    f"max by (run_id, rank) ({series('last_step_timestamp', RUNS)})"
                    f" - max by (run_id, rank) ({series('last_sample_timestamp', RUNS)})",
                    "{{run_id}} rank {{rank}}",
                )
            ],
            minimum=0,
        ),
        Panel(
            "Time to render a scrape",
            "s",
            "Good: below 50 ms; else serve fewer series, or scrape less often: it grows with ranks and groups.",
            [Query(f"max by (instance) ({series('scrape_duration', ANY_JOB)})", "{{instance}}")],
            minimum=0,
        ),
    ),
)

LOSSES = Row(
    "What is missing",
    (
        Panel(
            "Samples dropped a second",
            "suffix: /s",
            "Samples overwritten in the ring before the agent read them. Good: 0; else the agent lacks CPU time.",
            [rate("samples_dropped", "run_id", "rank", matchers=RUNS, legend="{{run_id}} rank {{rank}}")],
            minimum=0,
        ),
        Panel(
            "Series over the cap",
            "short",
            "Series left out because a rank has too many, since the agent started. Good: 0; else use fewer groups or"
            " raise `--series`.",
            [total("series_dropped", "run_id", "rank", matchers=RUNS, legend="{{run_id}} rank {{rank}}")],
            minimum=0,
        ),
        Panel(
            "Boards skipped",
            "short",
            "Boards that could not be read, since the agent started. Good: 0; else read the reason: a `version`"
            " in another environment's format needs an agent of that version.",
            [total("boards_skipped", "instance", "reason", matchers=ANY_JOB)],
            minimum=0,
            no_value="none",
        ),
        Panel(
            "Driver calls that failed",
            "short",
            "Calls of the GPU driver that failed or did not return in time, since the agent started. Good: 0; else"
            " look at the device itself.",
            [total("nvml_errors", "instance", matchers=ANY_JOB)],
            minimum=0,
        ),
        Panel(
            "Optimizers that could not be read",
            "short",
            "Errors in reading the state of an optimizer that is not optwatch's. Good: 0; else its statistics"
            " have ended (bytes and durations go on), and the warning of the training process says why.",
            [total("adapter_errors", "run_id", "optimizer", matchers=RUNS)],
            minimum=0,
        ),
        Panel(
            "History that was not written",
            "short",
            "Times the local store could not be written, since the agent started. Good: 0; else look for the reason in"
            " the agent's log: a full disk, or a directory that is not its own.",
            [total("store_failures", "instance", matchers=ANY_JOB)],
            minimum=0,
        ),
        Panel(
            "OTLP pushes a second",
            "suffix: /s",
            "Pushes that a collector took, and those that did not reach it. Good: no failures; else see"
            " ExportFailing.",
            [
                rate("otlp_exports", "instance", matchers=ANY_JOB, legend="taken {{instance}}"),
                rate(
                    "otlp_failures", "instance", "reason", matchers=ANY_JOB, legend="{{reason}} {{instance}}"
                ),
            ],
            minimum=0,
            no_value="no collector",
        ),
        Panel(
            "Agents",
            "string",
            "Version of each agent. Good: the same on all nodes; else install it anew on those that lag behind.",
            [Query(series("build", ANY_JOB), "")],
            kind="table",
            width=16,
        ),
    ),
)

BOARD = Board(
    "monitor",
    "The agents themselves: whether they answer, what watching costs, what is missing.",
    (OVERVIEW, COST, LOSSES),
    shown=("job", "run", "rank"),
    many_runs=True,
)
