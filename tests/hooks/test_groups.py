"""Names and groups of tensors."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given

from optwatch.hooks.groups import AFTER, ALL, BEFORE, RANGES, by_depth, parameter_names


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
