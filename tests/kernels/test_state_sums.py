"""Sums over the state of others' optimizers by the compiled library: float64's, in every format and size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.isas import isa  # noqa: F401 - a fixture
from optwatch.kernels.cpu.library import PATH
from optwatch.kernels.cpu.state import StateSpec, can_sum, state_sums
from optwatch.metrics.fields import row_fields
from optwatch.rules import RULES

pytestmark = [
    pytest.mark.skipif(not PATH.exists(), reason="built without a compiler: there is no library to test"),
    pytest.mark.usefixtures("isa"),
]

#: Below, at and beyond vectors, blocks and work items.
SIZES = (1, 31, 256, 513, 40_001)
#: Squares leave the range of fp32 at both ends.
SCALES = (1.0, 1e-30, 1e30)
SLOTS = ("m", "v")
SPEC = StateSpec(("fp32", "fp32"), (False, True), torch.float32, torch.float32)


class Kept:
    """A slot as its format keeps it, and its values."""

    def __init__(self, codec: str, values: Tensor) -> None:
        if codec == "table8":
            table = torch.linspace(0, 1, 256) if (values >= 0).all() else torch.linspace(-1, 1, 256)
            scales = torch.stack([part.abs().max() for part in values.split(256)])
            codes = torch.cat(
                [
                    (part[:, None] / scale - table).abs().argmin(1)
                    for part, scale in zip(values.split(256), scales, strict=True)
                ]
            )
            self.arrays = [codes.to(torch.uint8), scales, table]
            self.values = table.double()[codes] * scales.double().repeat_interleave(256)[: len(codes)]
        else:
            kept = values.to(torch.bfloat16 if codec == "bf16" else torch.float32)
            self.arrays, self.values = [kept], kept.double()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codecs", [("fp32", "fp32"), ("bf16", "fp32"), ("table8", "table8")], ids="-".join)
def test_sums_equal_float64(codecs: tuple[str, str], param_dtype: torch.dtype, scale: float) -> None:
    """All fields that can be had, at addresses that are no multiple of a vector."""
    gen = torch.Generator().manual_seed(0)

    def draw(n: int) -> Tensor:
        return torch.randn(n, generator=gen) * scale

    params = [draw(n + 1).to(param_dtype)[1:] for n in SIZES]
    grads = [draw(n + 1).to(param_dtype)[1:] for n in SIZES]
    slots = [[Kept(codecs[0], draw(n)), Kept(codecs[1], torch.rand(n, generator=gen) * scale)] for n in SIZES]
    spec = StateSpec(codecs, (False, True), param_dtype, param_dtype)
    assert can_sum(spec)
    rows = state_sums(spec, params, grads, [[kept.arrays for kept in of] for of in slots])
    for row, param, grad, (m, v) in zip(rows, params, grads, slots, strict=True):
        found = dict(zip(row_fields(SLOTS), row, strict=True))
        product = m.values * grad.double()
        expected = {
            "grad_sq": grad.double().square().sum(),
            "weight_sq": param.double().square().sum(),
            "m.exact_sq": m.values.square().sum(),
            "m.absmax": m.values.abs().max(),
            "v.exact_sq": v.values.sum(),
            "v.sum": v.values.sum(),
            "v.absmax": v.values.max(),
        }
        for name, value in expected.items():
            assert found[name] == pytest.approx(value.item(), rel=2e-6), name
        for name, terms in (("m.sum", m.values), ("moment_grad", product)):
            limit = 2e-6 * terms.abs().sum().item()
            assert found[name] == pytest.approx(terms.sum().item(), abs=limit, rel=0), name
        for name in ("nonfinite", "update_sq", "m.error_sq", "v.error_sq", "v.underflow", "m.saturated"):
            assert found[name] == 0, name


@pytest.mark.parametrize("name", ["adamw", "rmsprop_momentum", "sgd_momentum", "adagrad", "lion"])
def test_the_update_is_the_rules(name: str) -> None:
    """In float64 from the same state, whatever order the slots are in; scalars are each tensor's own."""
    rule, gen = RULES[name], torch.Generator().manual_seed(1)
    order = tuple(reversed(range(len(rule.slots))))
    spec = StateSpec(
        ("fp32",) * len(order),
        tuple(rule.slots[place].kind.name == "SECOND_MOMENT" for place in order),
        torch.float32,
        torch.float32,
        rule,
        order,
    )
    params, grads = ([torch.randn(n, generator=gen) for n in SIZES] for _ in range(2))
    slots = [[torch.rand(n, generator=gen) + 0.1 for _ in order] for n in SIZES]
    scalars = np.random.default_rng(0).uniform(0.1, 1, (len(SIZES), len(rule.scalars))).astype(np.float32)
    rows = state_sums(spec, params, grads, [[[slot] for slot in of] for of in slots], scalars)
    for row, grad, of, numbers in zip(rows, grads, slots, scalars, strict=True):
        state = [of[order[place]].double() for place in range(len(order))]
        update = rule.update(state, grad.double(), dict(zip(rule.scalars, numbers.tolist(), strict=True)))
        assert row[2] == pytest.approx(update.square().sum().item(), rel=1e-5)


def test_what_is_not_finite_is_counted_and_kept() -> None:
    """NaN and infinity are seen in the sums of what has them, and nowhere else."""
    grad, moment = torch.ones(1000), torch.ones(1000)
    grad[3], grad[999], moment[700] = math.inf, math.nan, math.nan
    rows = state_sums(SPEC, [torch.ones(1000)], [grad], [[[moment], [torch.ones(1000)]]])
    found = dict(zip(row_fields(SLOTS), rows[0], strict=True))
    assert found["nonfinite"] == 2
    assert math.isnan(found["grad_sq"])
    assert math.isnan(found["m.sum"])
    assert math.isnan(found["m.absmax"])
    assert found["weight_sq"] == found["v.sum"] == 1000
    assert found["v.absmax"] == 1


def test_the_same_for_any_number_of_threads() -> None:
    """Bit by bit."""
    gen = torch.Generator().manual_seed(2)
    params, grads, m, v = ([torch.rand(n, generator=gen) for n in SIZES] for _ in range(4))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(state_sums(SPEC, params, grads, [[[a], [b]] for a, b in zip(m, v, strict=True)]))
    finally:
        torch.set_num_threads(before)
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()


def test_what_the_library_does_not_know() -> None:
    """Is said before anything is read."""
    assert can_sum(SPEC)
    assert not can_sum(StateSpec(("fp16",), (False,), torch.float32, torch.float32))
    assert not can_sum(StateSpec(("fp32",) * 5, (False,) * 5, torch.float32, torch.float32))
    assert not can_sum(StateSpec((), (), torch.float16, torch.float32))
