"""Taking over a torch optimizer in the middle of a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optwatch.codecs import FORMATS
from optwatch.optim import replace
from optwatch.optim.replace import SUCCESSORS
from tests.optim.training import assert_same, parameters, train

OPTIONS: dict[type, dict[str, Any]] = {
    torch.optim.Adam: {"weight_decay": 0.1, "amsgrad": True},
    torch.optim.AdamW: {"lr": 1e-2, "betas": (0.8, 0.99)},
    torch.optim.SGD: {"lr": 1e-2, "momentum": 0.9, "nesterov": True},
    torch.optim.RMSprop: {"centered": True, "momentum": 0.5},
    torch.optim.Adagrad: {"lr_decay": 0.1},
    torch.optim.Adadelta: {"rho": 0.8},
}
CASES = [(kind, options) for kind in SUCCESSORS for options in ({}, OPTIONS[kind])]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_the_run_goes_on(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    """With fp32 state as if nothing had happened, on every memory layout and with a changed learning rate."""
    ours, theirs = parameters(), parameters()
    before, oracle = kind(ours, **options), kind(theirs, **options)
    for params, optimizer in ((ours, before), (theirs, oracle)):
        train(optimizer, params, range(5))
        optimizer.param_groups[0]["lr"] *= 0.5
    taken = replace(before, state="fp32", backend="reference")
    train(taken, ours, range(5, 10))
    train(oracle, theirs, range(5, 10))
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("state", FORMATS)
def test_the_state_is_in_the_format_asked_for(state: str) -> None:
    """All bytes are those that the format asks for, in every group."""
    params = parameters()
    before = torch.optim.AdamW(
        [{"params": params[:4]}, {"params": params[4:], "lr": 0.5, "weight_decay": 0.0}]
    )
    train(before, params, range(3))
    taken = replace(before, state=state, backend="reference")
    assert taken.state_bytes() == taken.expected_state_bytes()
    assert taken.param_groups[1]["lr"] == 0.5
    train(taken, params, range(3, 5))


def test_names_are_kept_and_strangers_refused() -> None:
    """A subclass may do anything in its step, so it is a stranger."""
    param = nn.Parameter(torch.ones(3))
    taken = replace(torch.optim.Adam([("layer.w", param)]), state="fp32")
    assert taken.param_groups[0]["param_names"] == ["layer.w"]

    class Own(torch.optim.Adam):
        pass

    with pytest.raises(
        TypeError, match=r"Own has no replacement in optwatch\.optim; there is one for torch\.optim"
    ):
        replace(Own([param]))
    with pytest.raises(ValueError, match="unknown state format 'int3'"):
        replace(torch.optim.Adam([param]), state="int3")


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_torch_goes_on_from_an_export(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], state: str
) -> None:
    """Its next step from the exported state is ours, whatever format ours is in: both start from the stored values."""
    ours, theirs = parameters(), parameters()
    mine = replace(kind(ours, **options), state=state, backend="reference")
    train(mine, ours, range(3))
    for param, other in zip(ours, theirs, strict=True):
        other.data.copy_(param.data)
    oracle = kind(theirs)
    oracle.load_state_dict(mine.export_state_dict("torch"))
    train(mine, ours, range(3, 4))
    train(oracle, theirs, range(3, 4))
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)
    assert {key: value for key, value in oracle.param_groups[0].items() if key in options} == options
