"""Scalars and random keys of a step, against those computed for every tensor by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optwatch.codecs import codec_for
from optwatch.kernels import PlanSpec
from optwatch.kernels.random import keys
from optwatch.optim import AdamW
from optwatch.optim.inputs import Counts, Inputs
from optwatch.rules import RULES

RULE = RULES["adamw"]
CODECS = tuple(codec_for("int8", slot.name, slot.kind, 1 << 20) for slot in RULE.slots)
SPEC = PlanSpec(RULE, CODECS, torch.float32, torch.float32)
OPTIONS = ("lr", "betas", "eps", "weight_decay", "maximize")
STEPS = st.integers(0, 2**24 - 2)


def group(number: int) -> dict[str, Any]:
    rates = {
        "lr": 1e-3 * (number + 1),
        "betas": (0.9, 0.99 + 0.001 * number),
        "eps": 1e-8,
        "weight_decay": 0.1,
    }
    return {**rates, "maximize": bool(number % 2), "seed": 7 * number}


@given(
    st.lists(st.tuples(STEPS, st.integers(0, 2)), min_size=1, max_size=6), st.integers(0, 2), st.booleans()
)
def test_each_tensor_gets_its_own(members: list[tuple[int, int]], fewer: int, alike: bool) -> None:
    """Whatever tensors have in common: none of it, their steps, or their group."""
    groups = [group(number) for number in range(3)]
    if alike:
        members = [(members[0][0], number) for _, number in members]
    group_of = np.array([number for _, number in members], np.intp)
    parameters = np.arange(len(members), dtype=np.uint64)
    counts = Counts([{"step": float(step)} for step, _ in members])
    inputs = Inputs(SPEC, counts, group_of, parameters, np.zeros(len(members), np.uint64))
    scalars, numbers = inputs.make(groups, OPTIONS, {}, fewer)
    for i, (step, number) in enumerate(members):
        at = float(max(step - fewer, 0))
        values = {name: groups[number][name] for name in OPTIONS}
        expected = np.array(RULE.prepare(values, max(at, 1.0)), np.float32)
        assert np.array_equal(scalars[i], expected)
        seed = np.array([groups[number]["seed"]], np.uint64)
        own = keys(seed, parameters[i : i + 1], len(CODECS) + 1, np.array([at]))
        assert np.array_equal(numbers[i], own[0])


@pytest.mark.parametrize("absent", [None, [False, True, False]])
def test_counts_are_the_states(absent: list[bool] | None) -> None:
    """Each is a view of one vector, and what somebody writes there counts from then on."""
    states: list[dict[str, Any]] = [{"step": 3.0} for _ in range(3)]
    counts = Counts(states)
    assert counts.common == 3
    counts.add(absent)
    stepped = [3 if absent and absent[i] else 4 for i in range(3)]
    assert [float(state["step"]) for state in states] == stepped
    assert counts.common == (None if absent else 4)
    for state in states:
        state["step"].fill_(99.0)
    counts.add(None)
    assert [float(state["step"]) for state in states] == [100.0] * 3
    counts.take_back(np.array([True, False, False]))
    assert Counts(states).common is None
    assert [float(state["step"]) for state in states] == [99.0, 100.0, 100.0]


def test_counts_end_where_fp32_does() -> None:
    """As torch.optim's own."""
    counts = Counts([{"step": float(2**24)}])
    counts.add(None)
    assert counts.common == 2**24


def test_another_seed_gives_other_numbers() -> None:
    """Though those of the seed before are kept."""
    groups = [group(0)]
    inputs = Inputs(
        SPEC, Counts([{"step": 5.0}]), np.zeros(1, np.intp), np.zeros(1, np.uint64), np.zeros(1, np.uint64)
    )
    before = inputs.make(groups, OPTIONS, {})[1].copy()
    assert np.array_equal(inputs.make(groups, OPTIONS, {})[1], before)
    groups[0]["seed"] = 8
    assert not np.array_equal(inputs.make(groups, OPTIONS, {})[1], before)


@pytest.mark.parametrize(
    ("option", "value"), [("betas", (1.0, 0.999)), ("betas", (0.9, 2.0)), ("lr", "fast"), ("eps", [1, 2])]
)
def test_an_option_that_became_senseless(option: str, value: object) -> None:
    """Named, with nothing stepped or counted; what is set right goes on."""
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    optimizer = AdamW([param], lr=0.1)
    optimizer.step()
    before, right = param.detach().clone(), optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=f"{option}="):
        optimizer.step()
    assert torch.equal(param, before)
    assert float(optimizer.state[param]["step"]) == 1
    optimizer.param_groups[0][option] = right
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 2
