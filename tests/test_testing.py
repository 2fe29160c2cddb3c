"""optwatch.testing: assertions for other people's tests."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optwatch.optim import AdamW
from optwatch.testing import assert_state_bytes


def stepped(kind: type[torch.optim.Optimizer], **options: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 80, bias=False))
    optimizer = kind(model.parameters(), **options)
    model(torch.ones(2, 80)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def test_low_bit_state_passes() -> None:
    """Two 8-bit moments and their scales; the small bias is kept in fp32."""
    model, optimizer = stepped(AdamW, state="int8")
    assert_state_bytes(optimizer, max_per_parameter=2.11, model=model)
    assert_state_bytes(optimizer)


def test_more_than_allowed() -> None:
    """The message names slots, storage types and parameters."""
    model, optimizer = stepped(torch.optim.AdamW)
    with pytest.raises(AssertionError) as caught:
        assert_state_bytes(optimizer, max_per_parameter=2.1, model=model)
    assert str(caught.value).splitlines() == [
        "AdamW: 8 bytes a parameter (12,880 of them), expected at most 2.1",
        "  slot exp_avg (float32): 4 a parameter",
        "  slot exp_avg_sq (float32): 4 a parameter",
        "  0.weight (6,400): 8 as exp_avg float32, exp_avg_sq float32",
        "  1.weight (6,400): 8 as exp_avg float32, exp_avg_sq float32",
        "  0.bias (80): 8 as exp_avg float32, exp_avg_sq float32",
    ]


def test_not_as_asked_for() -> None:
    """A state that was promoted behind the optimizer's back."""
    model, optimizer = stepped(AdamW, state="int8")
    weight = model[0].weight
    optimizer.state[weight].update(optimizer.dequantized_state(weight))
    with pytest.raises(AssertionError, match=r"slot exp_avg \(float32, cpu\): .* bytes, expected 320"):
        assert_state_bytes(optimizer)


def test_nothing_to_hold_it_to() -> None:
    """Before the first step, or without a known limit."""
    with pytest.raises(ValueError, match="has no state yet: take a step"):
        assert_state_bytes(AdamW([nn.Parameter(torch.ones(3))]), 2.1)
    with pytest.raises(
        ValueError, match="does not say how its state is to be stored: give max_per_parameter"
    ):
        assert_state_bytes(stepped(torch.optim.AdamW)[1])
