"""What the probe makes of a step that was clipped or skipped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from optwatch.hooks.probe import DECIDED, Probe
from optwatch.optim import AdamW


def test_the_norm_the_factor_and_what_was_skipped() -> None:
    """Norm and factor are gauges; a skipped step has the cheap statistics only, and is counted."""
    param = nn.Parameter(torch.ones(4))
    optimizer = AdamW([param], max_grad_norm=1.0, nonfinite="skip")
    published: list[int] = []
    probe = Probe(
        optimizer, "adamw", lambda _: (["w"], ["all"]), 1, lambda _: 1,
        lambda _, tables, step: published.extend(rows.shape[1] for rows in tables.values()),
        lambda: None, lambda call: call,
    )  # fmt: skip
    for value in (3.0, math.nan):
        param.grad = torch.full((4,), value)
        optimizer.step()
    gauges = {series.name: value for series, value in zip(*probe.gauges(), strict=True)}
    assert math.isnan(gauges[DECIDED[0]])
    assert published[0] > published[1] == 3
    assert {series.name: value for series, value in zip(*probe.counters(), strict=True)}[
        "optwatch.steps_skipped"
    ] == 1
    param.grad = torch.full((4,), 3.0)
    optimizer.step()
    gauges = {series.name: value for series, value in zip(*probe.gauges(), strict=True)}
    assert gauges[DECIDED[0]] == pytest.approx(6.0)
    assert gauges[DECIDED[1]] == pytest.approx(1 / 6)
    probe.close()
