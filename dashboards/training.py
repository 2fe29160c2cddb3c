"""Rows of the optimizer dashboard: how the run goes, step by step."""

from __future__ import annotations

from dashboards.panels import Panel, Query, Row
from dashboards.queries import (
    ERROR,
    GREEN_ABOVE_ZERO_RED,
    GROUP,
    OPTIMIZER,
    RUN,
    mean,
    node,
    quantiles,
    rate,
    series,
    total,
)

NOT_REPORTED = "not reported"
#: What a single figure says that is absent, and also one that is not a number: Grafana does not tell them apart.
NO_NUMBER = "none, or NaN"

OVERVIEW = Row(
    "Overview",
    (
        Panel(
            "Ranks by state",
            "short",
            "How many ranks are running, finished, failed or lost. Good: all of them running, or all finished;"
            " else see RankMissing.",
            [Query(f"sum by (state) ({series('run_state', RUN)}) > 0", "{{state}}")],
            kind="stat",
            width=4,
            height=4,
        ),
        Panel(
            "Step",
            "none",
            "Number of the newest step of any rank. Good: it grows; else see TrainingStalled.",
            [Query(f"max ({series('step', RUN)})", "step")],
            kind="stat",
            width=4,
            height=4,
        ),
        Panel(
            "Steps a second",
            "suffix: /s",
            "Optimizer steps a second, the slowest rank. Good: constant over a run; else look below which part of"
            " the step grew.",
            [Query(f"min (rate({series('steps', OPTIMIZER)}[$__rate_interval]))", "steps a second")],
            kind="stat",
            width=4,
            height=4,
            decimals=2,
        ),
        Panel(
            "Age of the last step",
            "s",
            "Time since the slowest rank ended a step. Good: not much more than one step and one scrape; else see"
            " TrainingStalled.",
            [Query(f"time() - min ({series('last_step_timestamp', RUN)})", "age")],
            kind="stat",
            width=4,
            height=4,
            steps=(("green", None), ("orange", 120), ("red", 600)),
        ),
        Panel(
            "Loss",
            "none",
            "Loss as the training loop reported it, mean over ranks. Good: falling, and finite; else look below"
            " what moved first: gradients, updates or learning rate.",
            [Query(f"avg ({series('loss', RUN)})", "loss")],
            kind="stat",
            width=4,
            height=4,
            decimals=4,
            no_value=NO_NUMBER,
        ),
        Panel(
            "Non-finite gradients",
            "short",
            "Gradient elements that were NaN or infinite in the time shown. Good: 0, or under loss scaling a few"
            " bursts; else see NonFiniteGradients.",
            [Query(f"sum (increase({series('nonfinite_elements', OPTIMIZER)}[$__range]))", "elements")],
            kind="stat",
            width=4,
            height=4,
            decimals=0,
            steps=GREEN_ABOVE_ZERO_RED,
        ),
        Panel(
            "State found and asked for",
            "bytes",
            "Bytes of optimizer state over all ranks, as found and as the constructor asked for. Good: the same;"
            " else see StateBytesUnexpected.",
            [total("optimizer.state", legend="found"), total("optimizer.state_expected", legend="asked for")],
            kind="stat",
            width=8,
            height=4,
            decimals=2,
        ),
        Panel(
            "State difference",
            "bytes",
            "State found minus asked for. Good: exactly 0, from the first step on; else the state is not stored the way"
            " it was asked for: see StateBytesUnexpected.",
            [
                Query(
                    f"sum ({series('optimizer.state', OPTIMIZER)})"
                    f" - sum ({series('optimizer.state_expected', OPTIMIZER)})",
                    "difference",
                )
            ],
            kind="stat",
            width=4,
            height=4,
            steps=(("red", None), ("green", 0), ("red", 1)),
        ),
        Panel(
            "State a parameter",
            "suffix: B",
            "Bytes of optimizer state a parameter. Good: 8 for fp32 AdamW, 4 for bf16, about 2.05 for int8; else"
            " the run lost its format: see StateBytesUnexpected.",
            [
                Query(
                    f"sum ({series('optimizer.state', OPTIMIZER)}) / sum ({series('parameters', OPTIMIZER)})",
                    "bytes a parameter",
                )
            ],
            kind="stat",
            width=4,
            height=4,
            decimals=3,
        ),
        Panel(
            "Worst update error",
            "percentunit",
            "How far the update from the stored state is off the exact one, relative to its size, in the worst"
            " group. Good: below 10 %; else see QuantizationErrorHigh.",
            [Query(f"max ({series('update_quantization_error.ratio', GROUP)})", "update error")],
            kind="stat",
            width=4,
            height=4,
            decimals=2,
            steps=ERROR,
            no_value=NO_NUMBER,
        ),
        Panel(
            "GPU memory free",
            "percentunit",
            "Free memory of the fullest GPU of the nodes. Good: above 5 %; else see MemoryHeadroomLow.",
            [Query(f"min (({node('device.memory.free')}) / ({node('device.memory.total')}))", "free")],
            kind="stat",
            width=4,
            height=4,
            no_value="no GPU",
            steps=(("red", None), ("orange", 0.05), ("green", 0.1)),
        ),
    ),
)

HEALTH = Row(
    "Step health",
    (
        Panel(
            "Optimizer step",
            "s",
            "Time inside optimizer.step(), over all ranks. Good: p99 close to p50; else compare the ranks, and"
            " what else runs on their hosts.",
            quantiles("optimizer_step_duration", OPTIMIZER),
            log=True,
        ),
        Panel(
            "Training step",
            "s",
            "Time from step to step, over all ranks. Good: p99 close to p50; else look for data loading and"
            " checkpoints at the spikes.",
            quantiles("step_duration", RUN),
            log=True,
        ),
        Panel(
            "Share of the optimizer in the step",
            "percentunit",
            "Time inside optimizer.step() of all time, by rank. Good: a few percent on a GPU, the same on all"
            " ranks; else see whether a compiled backend runs it (optwatch fleet, Optimizers).",
            [
                Query(
                    f"sum by (rank) (rate({series('optimizer_step_duration', OPTIMIZER, '_sum')}[$__rate_interval])) / "
                    f"sum by (rank) (rate({series('step_duration', RUN, '_sum')}[$__rate_interval]))",
                    "rank {{rank}}",
                )
            ],
            minimum=0,
        ),
        Panel(
            "Mean optimizer step by rank",
            "s",
            "Good: lines on top of each other; else a rank above the others holds all of them back: see"
            " StragglerRank.",
            [Query(mean("optimizer_step_duration", OPTIMIZER, "rank"), "rank {{rank}}")],
            minimum=0,
        ),
        Panel(
            "Steps and skipped steps a second",
            "suffix: /s",
            "Optimizer steps, and those in which no weight was updated. Good: none skipped, or under loss scaling"
            " few; else see SkippedStepsHigh.",
            [
                rate("steps", "optimizer", matchers=OPTIMIZER, legend="{{optimizer}}"),
                rate("steps_skipped", "optimizer", matchers=OPTIMIZER, legend="{{optimizer}} skipped"),
            ],
            minimum=0,
        ),
        Panel(
            "Learning rate",
            "none",
            "Learning rate by parameter group. Good: the schedule that you meant, without a jump at a resume;"
            " else load the scheduler's state with the optimizer's.",
            [
                Query(
                    f"max by (optimizer, param_group) ({series('learning_rate', OPTIMIZER)})",
                    "{{optimizer}} group {{param_group}}",
                )
            ],
        ),
        Panel(
            "Loss by rank",
            "none",
            "Loss as the training loop reported it. Good: falling; else look for the spike in the rows below.",
            [Query(f"max by (rank) ({series('loss', RUN)})", "rank {{rank}}")],
            width=12,
        ),
        Panel(
            "Ranks",
            "none",
            "1 while a rank's process is there. Good: 1 until the run is finished; else see RankMissing.",
            [Query(f"max by (rank) ({series('rank_up', RUN)})", "rank {{rank}}")],
            width=12,
            minimum=0,
        ),
    ),
)

REPORTED = Row(
    "What the loop reported",
    (
        Panel(
            "Tokens and samples a second",
            "suffix: /s",
            "What watch.count() was told, over all ranks. Good: constant; else look at the steps above.",
            [
                rate("training.tokens", legend="tokens"),
                rate("training.samples", legend="samples"),
            ],
            minimum=0,
            no_value=NOT_REPORTED,
        ),
        Panel(
            "Scalars",
            "none",
            "What watch.log() was told beside the loss, mean over the ranks. Good: whatever you know of them;"
            " else choose the time at which one left it, and look above and below.",
            [Query(f"avg by (name) ({series('scalar', RUN)})", "{{name}}")],
            no_value=NOT_REPORTED,
        ),
        Panel(
            "Run events",
            "short",
            "How often each happened so far, over the ranks; lines across all panels show when. Good: checkpoints"
            " as often as you meant; else, at a conversion, skipped step or failed allocation that you do not"
            " expect, look at its line in the panels below.",
            [total("events", "event", matchers=RUN)],
            minimum=0,
            no_value="none",
        ),
    ),
)
