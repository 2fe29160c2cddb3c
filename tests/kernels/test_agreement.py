"""The CPU kernels do what the reference does; and the reference's own statistics are right."""

from __future__ import annotations

import pytest
import torch

from optwatch.optim import AdamW
from optwatch.rules import RULES
from tests.kernels.agreement import (
    LARGE,
    PATTERNS,
    SIZES,
    Case,
    check_agreement,
    check_full_changes_nothing,
    check_norms_of_pieces,
    check_the_largest_second_moment,
    every_case,
    few_cases,
    lone_cases,
    runs,
    weight_cases,
)

# The reference against itself checks its statistics against float64; a few plans of each rule are enough for that.
BACKENDS = ("cpu", "reference")
#: One rule with every combination of formats and types, the others with a few.
OTHERS = [rule for rule in RULES if rule != "adamw"]
FEW = {name: [case for case in few_cases(OTHERS) if runs(name, case)] for name in BACKENDS}
ADAMW = [(name, case) for name in BACKENDS for case in few_cases() if runs(name, case)]


@pytest.mark.parametrize(
    ("backend", "case"),
    [("cpu", case) for case in every_case()] + [("reference", case) for case in few_cases()],
    ids=str,
)
def test_agrees_with_the_reference(backend: str, case: Case) -> None:
    """Every plan of AdamW, on every awkward size and pattern of values."""
    check_agreement(backend, case, SIZES, tuple(PATTERNS))


@pytest.mark.parametrize(("backend", "case"), [(b, c) for b in BACKENDS for c in FEW[b]], ids=str)
def test_every_rule_agrees_with_the_reference(backend: str, case: Case) -> None:
    """Every rule, on every pattern of values, a whole number of blocks and not."""
    check_agreement(backend, case, (31, 512, 4097), tuple(PATTERNS))


@pytest.mark.parametrize("case", lone_cases(), ids=str)
def test_every_format_agrees_to_the_last_bit(case: Case) -> None:
    """AdamW with each format beyond those, in every bit where its codec allows it."""
    check_agreement("cpu", case, (*SIZES, 5001), tuple(PATTERNS), exactly=True)


@pytest.mark.parametrize("case", [*every_case(), *lone_cases()], ids=str)
def test_agrees_on_a_large_odd_size(case: Case) -> None:
    """More than one work item, the last one partial."""
    check_agreement("cpu", case, (LARGE,), ("heavy tail",), steps=1)


@pytest.mark.parametrize(("backend", "case"), ADAMW, ids=str)
def test_full_statistics_change_no_bit(backend: str, case: Case) -> None:
    """200 steps of AdamW with and without."""
    check_full_changes_nothing(backend, case, (129, 4097), steps=200)


@pytest.mark.parametrize(("backend", "case"), [(b, c) for b in BACKENDS for c in FEW[b]], ids=str)
def test_full_statistics_of_every_rule_change_no_bit(backend: str, case: Case) -> None:
    """Ten steps with and without."""
    check_full_changes_nothing(backend, case, (129, 4097), steps=10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", weight_cases(), ids=str)
def test_every_weight_format(backend: str, case: Case) -> None:
    """Weights, what is beside them, and statistics; with and without which the bits are the same."""
    check_agreement(backend, case, (31, 512, 4097), tuple(PATTERNS))
    check_full_changes_nothing(backend, case, (129, 4097), steps=5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_of_pieces_are_put_together(backend: str) -> None:
    """As the ranks that have the pieces of a tensor do."""
    check_norms_of_pieces(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_second_moment_stays_finite(backend: str) -> None:
    """Reading it is clamped, as is what the statistics compare with."""
    check_the_largest_second_moment(backend)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    """The same weights, codes and sums for any number of threads."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for case in (few_cases()[-1], weight_cases()[4]):
            check_agreement("cpu", case, (LARGE,), ("heavy tail",), steps=1)
    finally:
        torch.set_num_threads(before)


def test_no_second_moment_is_ever_lost() -> None:
    """A million largest elements of a block, each with a random number of its own: none wraps to the code for zero.

    One that did would let its update explode, once in some hundred thousand.
    """
    param = torch.nn.Parameter(torch.zeros(1 << 22))
    optimizer = AdamW([param], state="int8", backend="cpu")
    gen = torch.Generator().manual_seed(0)
    for _ in range(64):
        param.grad = 1e-6 * torch.randn(len(param), generator=gen)
        optimizer.step()
        assert optimizer.state[param]["exp_avg_sq"].all()
