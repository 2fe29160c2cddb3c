"""torch.optim's own test inputs: what its classes take, ours take to the same weights; what they refuse, ours do."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    optim_db,
)

from optwatch import optim
from optwatch.optim.options import check
from tests.optim.training import BACKENDS, assert_same, parameters, train

INFOS: list[OptimizerInfo] = [info for info in optim_db if hasattr(optim, info.optim_cls.__name__)]
CPU = torch.device("cpu")


def _capturable(info: OptimizerInfo) -> list[OptimizerInput]:
    """Inputs that torch takes on GPUs only."""
    return [given for given in info.optim_inputs_func(device="cuda") if given.kwargs.get("capturable")]


INPUTS = [
    pytest.param(info, given, backend, id=f"{info.optim_cls.__name__}-{given.desc}-{backend}")
    for info in INFOS
    for given in (*info.optim_inputs_func(device=CPU), *_capturable(info))
    for backend in BACKENDS
]
ERRORS = [
    pytest.param(info, given, id=f"{info.optim_cls.__name__}-{given.optimizer_error_input.desc}")
    for info in INFOS
    for given in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
]
#: What torch's foreach steps cannot do. Ours has no such steps: the flag changes nothing.
TAKEN = (
    "lr as Tensor doesn't work with foreach & not capturable",
    "betas must be either both floats or both Tensors",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
)


def test_all_of_torchs_classes_are_covered() -> None:
    """By name; what torch calls the same must be the same."""
    assert {info.optim_cls.__name__ for info in INFOS} >= {
        "Adadelta",
        "Adagrad",
        "Adam",
        "AdamW",
        "RMSprop",
        "SGD",
    }


@pytest.mark.parametrize(("info", "given", "backend"), INPUTS)
def test_inputs(info: OptimizerInfo, given: OptimizerInput, backend: str) -> None:
    """The weights after some steps, on every memory layout, against torch's own in float64 and as near to it.

    Where -g + decay * w cancels, torch's fp32 step is off by more than a rounding as well.
    """
    ours, theirs, exact = parameters(), parameters(), parameters(torch.float64)
    kind = getattr(optim, info.optim_cls.__name__)
    train(kind(ours, backend=backend, **copy.deepcopy(given.kwargs)), ours, range(4))
    plain = {name: value for name, value in given.kwargs.items() if name != "capturable"}
    for params in (theirs, exact):
        train(info.optim_cls(params, **copy.deepcopy(plain)), params, range(4))
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        allowed = 1e-6 + 1e-5 * true.abs() + 2 * (other - true).abs()
        assert ((mine - true).abs() <= allowed).all()


def test_a_rate_of_one_element_in_any_shape() -> None:
    """As torch's scalar; one on another device would make each step wait, and is refused."""
    ours, theirs = parameters(), parameters()
    train(optim.AdamW(ours, lr=torch.tensor([1e-2])), ours, range(3))
    train(torch.optim.AdamW(theirs, lr=1e-2), theirs, range(3))
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="lr is a tensor on meta, which each step would have to wait for"):
        optim.AdamW(ours, lr=torch.zeros((), device="meta"))
    with pytest.raises(ValueError, match="momentum is a tensor on meta, but decides which state there is"):
        check("SGD", {"lr": 0.1, "momentum": torch.zeros((), device="meta")}, optim.SGD.ranges, {})


@pytest.mark.parametrize(("info", "given"), ERRORS)
def test_error_inputs(info: OptimizerInfo, given: ErrorOptimizerInput) -> None:
    """The same kind of error for the same input; in torch's words where they are torch's own."""
    found = given.optimizer_error_input
    kind = getattr(optim, info.optim_cls.__name__)
    params = found.params if found.params is not None else [nn.Parameter(torch.randn(2, 3))]
    if found.desc in TAKEN:
        ours, theirs = parameters(), parameters()
        plain: dict[str, Any] = {k: v for k, v in found.kwargs.items() if k != "foreach"}
        train(kind(ours, **found.kwargs), ours, range(3))
        plain["lr"] = float(plain["lr"])
        plain["betas"] = tuple(map(float, plain.get("betas", (0.9, 0.999))))
        train(info.optim_cls(theirs, **plain), theirs, range(3))
        assert_same(ours, theirs, rtol=1e-5, atol=1e-6)
    elif issubclass(given.error_type, Warning):
        with pytest.warns(given.error_type, match=given.error_regex):
            kind(params, **found.kwargs)
    else:
        option = re.match(r"Invalid (\w+) value", given.error_regex)
        words = f"{option[1]}=.* is out of range" if option else given.error_regex
        words = r"betas=.* is out of range" if "Invalid beta" in given.error_regex else words
        with pytest.raises(given.error_type, match=words):
            kind(params, **found.kwargs)
