"""Metrics pages as an agent serves them, for tests of what reads them."""

from __future__ import annotations

from optwatch.metrics.catalogue import CATALOGUE

RUN = {"run_id": "20261122-143255-9d86", "rank": "0"}
OPTIMIZER = {**RUN, "optimizer": "AdamW"}
PARAMETERS = 4_000_000


def sample(metric: str, value: float, **labels: str) -> str:
    """One line of a page; ``metric`` as in the catalogue, with ``#sum`` or ``#count`` for a histogram's parts."""
    name, _, part = metric.partition("#")
    spec = CATALOGUE[name]
    spec.check_labels(labels)
    pairs = ",".join(f'{key}="{text}"' for key, text in labels.items())
    return f"{spec.prometheus}{'_' + part if part else ''}{{{pairs}}} {value!r}"


def page(*, step: int = 100, seconds: float = 20.0, loss: float = 3.5, fp32: bool = False) -> str:
    """A run of one rank at ``step``, its int8 state as asked for or, with ``fp32``, silently promoted."""
    lines = [
        sample("optwatch.rank_up", 1, **RUN),
        sample("optwatch.run_state", 1, **RUN, state="running"),
        sample("optwatch.run_state", 0, **RUN, state="failed"),
        sample("optwatch.step", step, **RUN),
        sample("optwatch.loss", loss, **RUN),
        sample("optwatch.step_duration#count", step, **RUN),
        sample("optwatch.step_duration#sum", seconds, **RUN),
        sample("optwatch.overhead", seconds / 1000, **RUN),
        sample("optwatch.host_memory.rss", 5e8, **RUN),
        sample("optwatch.parameters", PARAMETERS, **OPTIMIZER, dtype="float32", device="cpu"),
    ]
    for slot, scales in (("exp_avg", PARAMETERS // 64), ("exp_avg_sq", PARAMETERS // 32)):
        asked = {"int8": PARAMETERS, "bfloat16": scales, "float32": 2 * scales}
        found = {"float32": 4 * PARAMETERS} if fp32 else asked
        of_slot = {**OPTIMIZER, "slot": slot, "device": "cpu"}
        lines += [
            sample("optwatch.optimizer.state", size, **of_slot, dtype=dtype) for dtype, size in found.items()
        ]
        lines += [
            sample("optwatch.optimizer.state_expected", size, **of_slot, dtype=dtype)
            for dtype, size in asked.items()
        ]
    for index in range(3):
        group = {**OPTIMIZER, "group": ("before blocks", "blocks 0-1", "after blocks")[index]}
        lines += [
            sample("optwatch.gradient.norm", 0.5 + index, **group),
            sample("optwatch.update_quantization_error.ratio", 0.01 * (1 + index), **group),
            sample("optwatch.update_to_parameter.ratio", 1.2e-3, **group),
            sample("optwatch.moment.norm", 0.3 * (1 + index), **group, slot="exp_avg"),
            sample("optwatch.moment.norm", 0.04, **group, slot="exp_avg_sq"),
            sample("optwatch.quantization_error.ratio", 0.006, **group, slot="exp_avg"),
        ]
    return "\n".join(lines) + "\n"
