"""The Triton kernels of every rule against the reference, in Triton's interpreter; see ``interpreted.py``.

The interpreter takes as long for a tile of one element as for a full one, so what every run of the tests does is
chosen: each rule once with 8-bit state, over full and partial tiles and the patterns that are hard on its formulas.
"""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch

from optwatch.codecs import WEIGHTS
from optwatch.kernels import backend
from optwatch.rules import RULES
from tests.codecs.samples import LOWER_HALVES, floats
from tests.kernels.agreement import (
    ALONE,
    ASIDE,
    CPU,
    DTYPES,
    OPTIONS,
    OWN_OPTIONS,
    PATTERNS,
    Case,
    check_agreement,
    check_full_changes_nothing,
    check_norms_of_pieces,
    check_the_largest_second_moment,
    check_weight_stores,
    few_cases,
    weight_cases,
)

assert os.environ["TRITON_INTERPRET"] == "1"

OTHERS = [rule for rule in RULES if rule != "adamw"]
#: Each rule with 8-bit state; the pairs of element types in turns.
CODED = [
    Case(rule, ("int8",) * len(RULES[rule].slots), *types)
    for rule, types in zip(OTHERS, itertools.cycle(itertools.product(DTYPES, DTYPES)), strict=False)
]
#: And with the formats that are combined, 8-bit state twice: the patterns in two turns.
COMBINED = [case for case in few_cases(OTHERS) if not {*case.formats} & {*ALONE}]
HARD = ("tiny", "heavy tail", "nan", "mostly zero")
#: Where the error of the update is that of a few elements whose new moment nearly cancels, and all others are clipped:
#: rounding in fp32 then shows beyond the tolerance of a sum, in the reference's almost as much.
LEFT_OUT = {"sophiag": {"small"}}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_a_kernel(rule: str) -> None:
    """None runs on the reference unnoticed."""
    assert backend("triton").why_not(few_cases([rule])[0].spec(), CPU) is None


@pytest.mark.parametrize("case", CODED, ids=str)
def test_agrees_with_the_reference(case: Case) -> None:
    """A full tile and a partial one; a step and, of a rule that has one, a step aside."""
    check_agreement("triton", case, (4097,), HARD[1:3], steps=2 if case.rule in ASIDE else 1)


@pytest.mark.parametrize("case", CODED, ids=str)
def test_full_statistics_change_no_bit(case: Case) -> None:
    """The two kernels leave the same weights and state."""
    check_full_changes_nothing("triton", case, (4097,), steps=1)


@pytest.mark.parametrize("rule", ["rmsprop_centered_momentum", "adadelta"])
def test_nothing_to_divide_by(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without eps, state of zeros gives 0/0 beyond the last element, which must not reach the others' blocks."""
    monkeypatch.setitem(OPTIONS, "eps", np.array([0.0]))
    case = Case(rule, ("int8",) * len(RULES[rule].slots), *DTYPES)
    check_agreement("triton", case, (31,), ("normal", "one sign"), steps=1)


@pytest.mark.parametrize("rule", ["sgd_momentum", "lion", "rmsprop"])
def test_options_at_their_ends(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maximizing, without memory, and without Nesterov's form."""
    for name, value in {"maximize": 1.0, "nesterov": 0.0, "alpha": 0.0, "momentum": 0.0}.items():
        monkeypatch.setitem(OPTIONS, name, np.array([value]))
    monkeypatch.setitem(OWN_OPTIONS, "lion", {"betas": np.array([[0.5, 0.0]])})
    check_agreement("triton", few_cases([rule])[0], (129,), HARD, steps=1)


def test_norms_of_pieces_are_put_together() -> None:
    """As the ranks that have the pieces of a tensor do."""
    check_norms_of_pieces("triton")


def test_the_largest_second_moment_stays_finite() -> None:
    """Reading it is clamped, as is what the statistics compare with."""
    check_the_largest_second_moment("triton")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_weight_is_stored_as_the_reference_does(weights: str) -> None:
    """One in a hundred upper halves of an fp32 number, and those where something ends."""
    ends = [sign | upper for sign in (0, 0x8000) for upper in (0, 1, 0x7F, 0x80, 0x7F7F, 0x7F80, 0x7FC0)]
    upper = torch.cat([torch.arange(0, 65536, 101), torch.tensor(ends)])
    values = floats(upper, torch.tensor(LOWER_HALVES))
    check_weight_stores(lambda spec, tensor: backend("triton").bind(spec, [tensor]), weights, values)


@pytest.mark.parametrize("case", weight_cases()[3::3], ids=str)
def test_weight_formats(case: Case) -> None:
    """A step with statistics, and that they change nothing."""
    check_agreement("triton", case, (4097,), HARD, steps=1)
    check_full_changes_nothing("triton", case, (4097,), steps=2)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "turn"), [(case, i % 2) for i, case in enumerate(COMBINED)], ids=str)
def test_every_format_agrees_with_the_reference(case: Case, turn: int) -> None:
    """Over a full tile and a partial one."""
    patterns = tuple(pattern for pattern in PATTERNS if pattern not in LEFT_OUT.get(case.rule, ()))
    check_agreement("triton", case, (4097,), patterns[turn::2], steps=2)
