"""The allocator's figures."""

from __future__ import annotations

import pytest
import torch

from optwatch.board import Series
from optwatch.hooks.allocator import COUNTERS, GAUGES, Allocator, pinned_bytes
from optwatch.metrics.catalogue import CATALOGUE


def test_every_figure_is_in_the_catalogue() -> None:
    """Under its name, as gauge or counter; and no allocator metric is left without a source."""
    known = {name for name in CATALOGUE if name.startswith("optwatch.allocator.")}
    assert known == {f"optwatch.allocator.{name}" for name in (*GAUGES, *COUNTERS)}
    for names, instrument in ((GAUGES, "gauge"), (COUNTERS, "counter")):
        assert {CATALOGUE[f"optwatch.allocator.{name}"].instrument for name in names} == {instrument}


def test_without_a_gpu_there_is_nothing() -> None:
    """Absent, not zero."""
    allocator = Allocator([torch.ones(3)])
    allocator.read()
    assert allocator.gauges().series == allocator.counters().series == ()
    assert pinned_bytes() is None


@pytest.mark.gpu
def test_figures_are_torchs_own() -> None:
    """To the byte, on a real device."""
    held = torch.ones(1 << 20, device="cuda")
    allocator = Allocator([held])
    figures = {series.name: value for series, value in zip(*allocator.gauges(), strict=True)}
    assert figures["optwatch.allocator.allocated"] == torch.cuda.memory_allocated()
    assert figures["optwatch.allocator.reserved_peak"] == torch.cuda.max_memory_reserved()
    assert all(isinstance(series, Series) for series in allocator.counters().series)
    before = figures["optwatch.pinned_memory"]
    pinned = torch.empty(3 << 20, dtype=torch.uint8, pin_memory=True)
    allocator.read()
    figures = {series.name: value for series, value in zip(*allocator.gauges(), strict=True)}
    assert figures["optwatch.pinned_memory"] >= before + pinned.nbytes
