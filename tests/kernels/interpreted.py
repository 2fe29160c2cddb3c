"""The Triton kernels against the reference, in Triton's interpreter.

Not collected by name: the interpreter is a choice of the whole process, so ``test_triton_interpreter.py`` runs this
file in one of its own.
"""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch

from optwatch.kernels import PlanTensor, backend
from optwatch.optim import AdamW
from tests.kernels.agreement import (
    ALONE,
    CPU,
    DTYPES,
    LARGE,
    PATTERNS,
    SIZES,
    Case,
    check_agreement,
    check_full_changes_nothing,
    clone,
    every_case,
    few_cases,
    items,
    keys_of,
    lone_cases,
    scalars_of,
)
from tests.scenarios import BETA1, BETA2, EPS, SCENARIOS, compare

assert os.environ["TRITON_INTERPRET"] == "1"

INT8 = Case("adamw", ("int8", "int8"), torch.float32, torch.float32)


@pytest.mark.parametrize("case", [case for case in few_cases() if case.formats[0] not in ALONE], ids=str)
def test_agrees_with_the_reference(case: Case) -> None:
    """Each format and pair of types, on every awkward size and pattern of values."""
    check_agreement("triton", case, SIZES, tuple(PATTERNS), steps=1)


@pytest.mark.parametrize("case", lone_cases()[::2], ids=str)
def test_every_format_agrees_with_the_reference(case: Case) -> None:
    """The other formats, on a partial tile, a full one with an odd rest, and what is hard on their formulas."""
    check_agreement("triton", case, (31, 4097), ("heavy tail", "huge", "mostly zero", "inf"), steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("case", lone_cases()[1::2], ids=str)
def test_every_format_agrees_on_every_pattern(case: Case) -> None:
    """And on every pattern."""
    check_agreement("triton", case, (127, 4097), tuple(PATTERNS), steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("case", every_case(), ids=str)
def test_every_plan_agrees_with_the_reference(case: Case) -> None:
    """Every plan."""
    check_agreement("triton", case, (129, 4097), ("heavy tail", "nan"), steps=1)


@pytest.mark.slow
def test_agrees_on_a_large_odd_size() -> None:
    """Many work items, the last one partial."""
    check_agreement("triton", INT8._replace(grad=torch.bfloat16), (LARGE,), ("heavy tail",), steps=1)


@pytest.mark.slow
def test_hard_gradients() -> None:
    """The update stays as close to exact Adam's as the format promises."""
    scenario = SCENARIOS["heavy_tail"]
    options = {"lr": 1.0, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": 0.0}
    found = compare(lambda p: AdamW([p], **options, state="int8", backend="triton"), scenario)
    assert found.nrmse <= scenario.limit


@pytest.mark.parametrize("case", few_cases(), ids=str)
def test_full_statistics_change_no_bit(case: Case) -> None:
    """The two kernels leave the same weights and state, step after step."""
    alone = case.formats[0] in ALONE
    check_full_changes_nothing("triton", case, (4097,) if alone else (129, 20_001), steps=2 if alone else 5)


@pytest.mark.parametrize(("param", "grad"), list(itertools.product(DTYPES, DTYPES)))
def test_any_alignment(param: torch.dtype, grad: torch.dtype) -> None:
    """Tensors and state that start at odd elements of their storage get the same bits as others."""
    case = INT8._replace(param=param, grad=grad)
    spec = case.spec()
    item = items(spec, (33_000,), ("heavy tail",), 1)[0]
    aligned, shifted = clone(item.tensor), _shifted(item.tensor)
    plans = [backend("triton").bind(spec, [tensor]) for tensor in (aligned, shifted)]
    scalars, numbers = scalars_of(spec.rule, 1, 3), keys_of(spec, 1, 3)
    (gradient,) = item.grads
    plans[0].run([gradient], scalars, numbers, True)
    plans[1].run([_shift(gradient)], scalars, numbers, True)
    assert torch.equal(aligned.param, shifted.param)
    for mine, theirs in zip(aligned.slots, shifted.slots, strict=True):
        assert all(torch.equal(buffer, theirs[name]) for name, buffer in mine.items())


def _shift(tensor: torch.Tensor) -> torch.Tensor:
    room = torch.empty(len(tensor) + 1, dtype=tensor.dtype)
    room[1:] = tensor
    return room[1:]


def _shifted(tensor: PlanTensor) -> PlanTensor:
    slots = tuple({name: _shift(buffer) for name, buffer in slot.items()} for slot in tensor.slots)
    return PlanTensor(_shift(tensor.param), slots)


def test_nonfinite_gradients_are_counted() -> None:
    """Also where the sum of squares is not finite although each gradient is, and where it is NaN."""
    spec = INT8.spec()
    grads = [torch.full((20_000,), value) for value in (1e30, 1.0, 2.0, 3.0)]
    grads[1][::7] = np.inf
    grads[2][-3:] = np.nan
    tensors = [
        PlanTensor(torch.zeros(20_000), tuple(c.allocate(20_000, CPU) for c in spec.codecs)) for _ in grads
    ]
    plan = backend("triton").bind(spec, tensors)
    rows = plan.run(grads, scalars_of(spec.rule, 4, 1), keys_of(spec, 4, 1), False)
    assert rows[:, 1].tolist() == [0.0, len(range(0, 20_000, 7)), 3.0, 0.0]


def test_rows_last_until_the_second_run_after() -> None:
    """Whoever copies a row a step later still finds it."""
    spec = INT8.spec()
    item = items(spec, (4097,), ("normal",), 1)[0]
    plan = backend("triton").bind(spec, [item.tensor])
    first = plan.run(item.grads, scalars_of(spec.rule, 1, 1), keys_of(spec, 1, 1), True)
    kept = first.clone()
    plan.run(item.grads, scalars_of(spec.rule, 1, 2), keys_of(spec, 1, 2), True)
    assert torch.equal(first, kept)


def test_says_what_it_cannot_run() -> None:
    """Types without a kernel, by name."""
    spec = INT8._replace(param=torch.float64).spec()
    assert backend("triton").why_not(spec, CPU) == "no kernel for torch.float64"
    assert backend("triton").why_not(INT8.spec(), CPU) is None
