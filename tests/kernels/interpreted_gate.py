"""Steps that the device decides, in Triton's interpreter; see ``interpreted.py``. The host hears early or late."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optwatch import optim
from optwatch.kernels import PlanTensor, backend
from optwatch.optim.decisions import Ledger
from tests.kernels.agreement import Case
from tests.optim.training import assert_same, give_gradients

assert os.environ["TRITON_INTERPRET"] == "1"

BAD = (3, 4, 7, 12)


OFTEN = ((optim.AdamW, "raise", True), (optim.LAMB, "zero", False))
CASES = [
    pytest.param(*case, marks=[] if case in OFTEN else [pytest.mark.slow])
    for case in itertools.product((optim.AdamW, optim.LAMB), ("skip", "zero", "raise"), (False, True))
]


def parameters() -> list[nn.Parameter]:
    gen = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=gen)) for n in (300, 20)]


def run(optimizer: optim.Optimizer, params: list[nn.Parameter], taken: Any, poison: float | None) -> int:
    """Fourteen steps, in one of which a parameter has no gradient; returns how often an error named it."""
    raised = 0
    for step in filter(taken, range(14)):
        give_gradients(params, step)
        if step in BAD and poison is not None:
            params[0].grad[5] = poison
        if step == 5:
            params[1].grad = None
        try:
            optimizer.step()
        except RuntimeError as error:
            assert "parameter 0 of group 0" in str(error)  # noqa: PT017 - not in every step
            raised += 1
            optimizer.step()
    return raised


@pytest.mark.parametrize(("kind", "mode", "late"), CASES)
def test_what_was_skipped_was_never_taken(
    kind: type[optim.Optimizer], mode: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, step counts and random numbers too, also while the host knows of none of the last eight steps."""
    if late:
        monkeypatch.setattr(Ledger, "_known", staticmethod(lambda step: False))
    ours, theirs = parameters(), parameters()
    options: dict[str, Any] = {"state": {"default": "bf16"}, "backend": "triton", "max_grad_norm": 5.0}
    optimizer, plain = kind(ours, **options, nonfinite=mode), kind(theirs, **options)
    raised = run(optimizer, ours, lambda step: True, math.nan)
    run(plain, theirs, lambda step: mode == "zero" or step not in BAD, 0.0 if mode == "zero" else None)
    assert_same(ours, theirs, rtol=0, atol=0)
    states = zip(*(o.state_dict()["state"].values() for o in (optimizer, plain)), strict=True)
    assert all(torch.equal(mine[key], other[key]) for mine, other in states for key in other)
    assert bool(raised) == (mode == "raise")


def test_zeros_that_the_host_asks_for() -> None:
    """As the reference: what is not finite counts as zero though the device decides nothing."""
    spec = Case("sgd_momentum", ("fp32",), torch.float32, torch.float32).spec()
    scalars = np.full((2, len(spec.rule.scalars)), 0.5, np.float32)
    found = []
    for name in ("triton", "reference"):
        params = [torch.ones(300), torch.ones(20)]
        tensors = [PlanTensor(param, ({"values": torch.zeros(len(param))},)) for param in params]
        grads = [torch.ones(300), torch.ones(20)]
        grads[0][[3, 77]], grads[1][5] = math.nan, -math.inf
        plan = backend(name).bind(spec, tensors)
        for zero, given in ((True, grads), (False, [torch.ones(300), None])):
            rows = plan.run(given, scalars, np.zeros((2, 2, 2), np.uint32), False, zero)
        found.append([rows, *params, *(tensor.slots[0]["values"] for tensor in tensors)])
    assert all(torch.equal(mine, other) for mine, other in zip(*found, strict=True))


def test_sums_of_gradients() -> None:
    """As the reference has them, of whole and partial tiles, NaN, infinities and nothing."""
    spec = Case("sgd", (), torch.float32, torch.bfloat16).spec()
    grads = [torch.randn(n).bfloat16() for n in (40_000, 4096, 7)]
    grads[0][[3, -1]] = torch.tensor([math.nan, math.inf]).bfloat16()
    tensors = [PlanTensor(torch.zeros(len(g)), ()) for g in grads]
    found, expected = (
        backend(name).bind(spec, tensors).sum_gradients([*grads[:2], None])
        for name in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0, equal_nan=True)
