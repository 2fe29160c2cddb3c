"""Names and groups of tensors."""

from __future__ import annotations

import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from optwatch.board import BoardReader
from optwatch.hooks import watch
from optwatch.hooks.groups import (
    AFTER,
    ALL,
    BEFORE,
    MAXIMUM_GROUPS,
    OTHER,
    RANGES,
    GroupBy,
    by_depth,
    grouping,
    parameter_names,
)
from optwatch.optim import AdamW


def test_a_transformer_is_grouped_by_depth() -> None:
    """Embeddings, ranges of blocks, and what follows; at most six groups."""
    names = [
        "wte.weight",
        "wpe.weight",
        *(f"h.{i}.attn.{j}.weight" for i in range(12) for j in range(2)),
        "ln_f.weight",
    ]
    groups = by_depth(names)
    assert groups[:2] == [BEFORE, BEFORE]
    assert groups[-1] == AFTER
    assert groups[2] == "blocks 0-2"
    assert groups[-2] == "blocks 9-11"
    assert len(set(groups)) == RANGES + 2


def test_few_blocks_are_named_one_by_one() -> None:
    """Two layers make two groups."""
    assert by_depth(["0.weight", "0.bias", "1.weight"]) == ["block 0", "block 0", "block 1"]


def test_no_blocks_make_one_group() -> None:
    """Also where there is only one."""
    assert by_depth(["weight", "bias"]) == [ALL, ALL]
    assert by_depth(["layers.0.weight"]) == [ALL]
    assert by_depth([]) == []


@given(st.integers(2, 400), st.integers(1, 9))
def test_ranges_cover_every_block_in_order(depth: int, ranges: int) -> None:
    """Each block is in the range that its name says; no more ranges than asked for."""
    groups = by_depth([f"h.{i}.w" for i in range(depth)], ranges)
    assert len(set(groups)) <= ranges
    for i, group in enumerate(groups):
        low, _, high = group.removeprefix("blocks ").removeprefix("block ").partition("-")
        assert int(low) <= i <= int(high or low)


def test_names_come_from_the_model_then_the_optimizer() -> None:
    """A parameter that neither knows gets its number."""
    a, b, c = (torch.nn.Parameter(torch.ones(1)) for _ in range(3))
    groups = [{"params": [a, b], "param_names": ["first", "second"]}, {"params": [c]}]
    assert parameter_names(groups, [("model.b", b)]) == ["first", "model.b", "parameter 2"]


LAYERS = ["embed.weight", *(f"h.{i}.{part}.weight" for i in range(30) for part in ("attn", "mlp"))]


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        (r"attn|mlp", [OTHER] + ["attn", "mlp"] * 30),
        (r"\.(attn|mlp)\.(weight|bias)", [OTHER] + ["attn weight", "mlp weight"] * 30),
        (re.compile("embed"), ["embed"] + [OTHER] * 60),
        (lambda name: name.split(".")[-2], ["embed"] + ["attn", "mlp"] * 30),
        (lambda name: "", [OTHER] * 61),
        (None, by_depth(LAYERS)),
    ],
)
def test_groups_by_pattern_or_function(by: GroupBy, expected: list[str]) -> None:
    """What a pattern matches, or a function says, is the group."""
    assert grouping(by)(LAYERS) == expected


@pytest.mark.parametrize("by", [r"h\.\d+", lambda name: name])
def test_groups_are_few(by: GroupBy) -> None:
    """However many there would be, their number is bounded, and no tensor is left out."""
    groups = grouping(by)(LAYERS)
    assert len(groups) == len(LAYERS)
    assert len(set(groups)) == MAXIMUM_GROUPS
    assert groups[-1] == OTHER


@pytest.mark.parametrize(("by", "kind"), [("(", ValueError), (3, TypeError)])
def test_a_grouping_that_is_none(by: object, kind: type[Exception]) -> None:
    """The message says what was expected."""
    with pytest.raises(kind, match="expected a regular expression"):
        grouping(by)  # type: ignore[arg-type]


def test_a_function_that_fails_is_said(tmp_path: Path) -> None:
    """One warning; the run is watched, its tensors grouped by depth."""
    model = torch.nn.Linear(4, 4)
    optimizer = AdamW(model.parameters())
    run = watch(optimizer, model, groups={}.__getitem__, directory=tmp_path, agent=False)
    model(torch.ones(4)).sum().backward()
    with pytest.warns(RuntimeWarning, match=r"groups of tensors are by depth.*KeyError"):
        optimizer.step()
    run.close()
    (path,) = tmp_path.glob("*.board")
    assert {tensor.group for tensor in BoardReader(path).schema.tables[0].tensors} == {ALL}
