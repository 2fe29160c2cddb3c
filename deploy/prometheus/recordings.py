"""Recording rules: what alerts and panels read that would be heavy to compute for each of them."""

from __future__ import annotations

from dataclasses import dataclass

from optwatch.metrics.catalogue import CATALOGUE

name = {key.removeprefix("optwatch."): spec.prometheus for key, spec in CATALOGUE.items()}


@dataclass(frozen=True)
class Recording:
    """A series that is computed once and read by alerts and panels; its name lists the labels that it keeps."""

    record: str
    expr: str
    labels: tuple[str, ...]


RUN_RANK = ("run_id", "rank")
RUN_RANK_OPTIMIZER = (*RUN_RANK, "optimizer")
RUN_OPTIMIZER_GROUP = ("run_id", "optimizer", "group")
RUN_OPTIMIZER_SLOT_GROUP = ("run_id", "optimizer", "slot", "group")


def _worst(metric: str, *labels: str) -> Recording:
    """The largest over ranks."""
    level = "_".join(label.removesuffix("_id") for label in labels)
    return Recording(f"{level}:{name[metric]}:max", f"max by ({', '.join(labels)}) ({name[metric]})", labels)


def _mean(metric: str, *labels: str) -> Recording:
    """The mean of a histogram over five minutes."""
    level, by = "_".join(label.removesuffix("_id") for label in labels), ", ".join(labels)
    parts = (f"sum by ({by}) (rate({name[metric]}_{part}[5m]))" for part in ("sum", "count"))
    return Recording(f"{level}:{name[metric]}:mean5m", " / ".join(parts), labels)


UPDATE_ERROR = _worst("update_quantization_error.ratio", *RUN_OPTIMIZER_GROUP)
GRADIENT_NORM = _worst("gradient.norm", *RUN_OPTIMIZER_GROUP)
UPDATE_RATIO = _worst("update_to_parameter.ratio", *RUN_OPTIMIZER_GROUP)
UNDERFLOW = _worst("quantization_underflow.ratio", *RUN_OPTIMIZER_SLOT_GROUP)
SATURATED = _worst("quantization_saturated.ratio", *RUN_OPTIMIZER_SLOT_GROUP)
STEP_MEAN = _mean("step_duration", *RUN_RANK)
OPTIMIZER_STEP_MEAN = _mean("optimizer_step_duration", *RUN_RANK_OPTIMIZER)

STATE = "run_rank_optimizer:optwatch_optimizer_state_bytes:sum"
EXPECTED = "run_rank_optimizer:optwatch_optimizer_state_expected_bytes:sum"
PER_PARAMETER = "run_rank_optimizer:optwatch_optimizer_state_bytes_per_parameter:ratio"
JOB_PER_PARAMETER = "job_optimizer:optwatch_optimizer_state_bytes_per_parameter:max"

RECORDINGS = (
    Recording(
        STATE,
        f"sum by (run_id, rank, optimizer) ({name['optimizer.state']})",
        RUN_RANK_OPTIMIZER,
    ),
    Recording(
        EXPECTED,
        f"sum by (run_id, rank, optimizer) ({name['optimizer.state_expected']})",
        RUN_RANK_OPTIMIZER,
    ),
    # Above zero only: before the first step there is no state, and "grew from nothing" is no regression.
    Recording(
        PER_PARAMETER,
        f"({STATE} > 0) / sum by (run_id, rank, optimizer) ({name['parameters']})",
        RUN_RANK_OPTIMIZER,
    ),
    # A resumed job is a new run under the same scheduler's job: this series survives the restart.
    Recording(
        JOB_PER_PARAMETER,
        "max by (job_id, optimizer) (\n"
        f"  {PER_PARAMETER}\n"
        f'  * on (run_id, rank) group_left (job_id) max by (run_id, rank, job_id) ({name["run"]}{{job_id!=""}})\n'
        ")",
        ("job_id", "optimizer"),
    ),
    UPDATE_ERROR,
    GRADIENT_NORM,
    UPDATE_RATIO,
    UNDERFLOW,
    SATURATED,
    STEP_MEAN,
    OPTIMIZER_STEP_MEAN,
)
