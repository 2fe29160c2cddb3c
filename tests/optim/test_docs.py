"""docs/optimizers.md has what the optimizers do; docs/storage-formats.md the figures that were measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from optwatch import optim
from optwatch.codecs import FORMATS

TABLE = re.compile(r"^\| optimizer \| slots \| (.*?) \|\n\|[-|]*\n((?:\|.*\n)*)", re.MULTILINE)
ROOT = Path(__file__).parents[2]
FOUND = TABLE.search((ROOT / "docs" / "optimizers.md").read_text())
assert FOUND
CELLS = [[cell.strip() for cell in line.strip("|").split("|")] for line in FOUND[2].splitlines()]
ROWS = [
    (call, slots, dict(zip(FOUND[1].split(" | "), map(float, figures), strict=True)))
    for calls, slots, *figures in CELLS
    for call in re.findall(r"`(.*?)`", calls)
]


def test_every_optimizer_is_there() -> None:
    """Each class has a row at least, and each format a column."""
    assert all(list(figures) == list(FORMATS) for _, _, figures in ROWS)
    exported = {name: getattr(optim, name) for name in optim.__all__}
    classes = {
        n for n, kind in exported.items() if isinstance(kind, type) and issubclass(kind, optim.Optimizer)
    }
    assert {re.split(r"\W", call)[0] for call, _, _ in ROWS} == classes - {"Optimizer"}


@pytest.mark.parametrize(("call", "slots", "figures"), ROWS, ids=[call for call, _, _ in ROWS])
def test_slots_and_bytes(call: str, slots: str, figures: dict[str, float]) -> None:
    """The slots in their order, and the bytes a parameter, in each format."""
    name, _, options = call.partition("(")
    keywords = eval(f"dict({options.removesuffix(')')})")
    param = nn.Parameter(torch.zeros(1 << 16))
    param.grad = torch.ones_like(param)
    for state, expected in figures.items():
        optimizer = getattr(optim, name)([param], state=state, backend="reference", **keywords)
        optimizer.step()
        assert list(optimizer.slot_names()) == [slot.strip() for slot in slots.split(",") if slot.strip()]
        found = sum(optimizer.state_bytes().values()) - 4  # the step count
        assert found / param.numel() == pytest.approx(expected, abs=6e-4)


def test_the_measured_tables_are_those_of_the_benchmark() -> None:
    """Line by line, of every format and peer."""
    measured = (ROOT / "benchmarks" / "results" / "stress.md").read_text()
    quoted = (ROOT / "docs" / "storage-formats.md").read_text().splitlines()
    lines = [line for line in measured.splitlines() if re.match(r"\| [`\w]", line)]
    assert {fmt for fmt in FORMATS for line in lines if line.startswith(f"| `{fmt}` |")} == set(FORMATS)
    assert [line for line in lines if line not in quoted] == []
