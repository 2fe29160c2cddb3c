"""Scalars and random keys computed by torch, as on a device, against those that the host computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optwatch.kernels.random import device_keys, keys, offsets, streams
from optwatch.rules import RULES
from tests.kernels.agreement import ASIDE, OPTIONS, OWN_OPTIONS

STEPS = np.concatenate([np.arange(1, 3000), 2.0 ** np.arange(12, 25)])
#: Options of which a rule has another branch.
ENDS: tuple[dict[str, Any], ...] = (
    {},
    {"alpha": 0.0, "nesterov": 0.0, "bias_correction": 0.0, "trust_clip": 1.0, "always_adapt": 0.0},
    {"alpha_warmup": np.nan, "beta3_warmup": np.nan, "weight_decay": 0.0, "maximize": 1.0},
)


def options_of(rule: str, ends: int) -> dict[str, Any]:
    """The options of one tensor, as arrays."""
    options = OPTIONS | OWN_OPTIONS.get(rule, {}) | (ASIDE.get(rule, {}) if ends == 1 else {})
    return options | {name: np.array([value]) for name, value in ENDS[ends].items() if name in options}


@pytest.mark.parametrize("ends", range(len(ENDS)))
@pytest.mark.parametrize("rule", RULES)
def test_scalars(rule: str, ends: int) -> None:
    """The same fp32 numbers, but for a power or a root that the libraries round otherwise: then the next one."""
    options = options_of(rule, ends)
    values = {name: np.repeat(value, len(STEPS), axis=0) for name, value in options.items()}
    there = RULES[rule].prepare({n: torch.from_numpy(v) for n, v in values.items()}, torch.from_numpy(STEPS))
    here = RULES[rule].prepare(values, STEPS)
    assert there.dtype == torch.float32
    np.testing.assert_array_max_ulp(there.numpy(), here, maxulp=1)
    assert (there.numpy() != here).mean() < 1e-4


def test_keys() -> None:
    """Bit by bit, of seeds with every bit set, of pieces that begin far inside, and of many steps."""
    seeds = np.array([0, 1, 2**64 - 1, 2**63, 12345], np.uint64)
    parameters = np.array([0, 7, 2**40 + 3, 2**63 + 1, 2], np.uint64)
    first = np.array([0, 2, 2**31, 2**33 + 6, 2**40], np.uint64)
    fixed = torch.from_numpy(streams(seeds, parameters, 3).view(np.int64))
    for step in (0, 1, 2, 1000, 2**24):
        for begin in (np.zeros(5, np.uint64), first):
            steps = step + np.array([0.0, 1, 0, 2, 0])
            there = device_keys(
                fixed, torch.from_numpy(offsets(begin).view(np.int32)), torch.from_numpy(steps)
            )
            assert np.array_equal(there.numpy(), keys(seeds, parameters, 3, steps, begin))


@pytest.mark.parametrize("ends", range(len(ENDS)))
@pytest.mark.parametrize("rule", RULES)
def test_scalars_of_floats(rule: str, ends: int) -> None:
    """Those that a step gets on the host, against the arrays': the same, but for the last bit of a power or a root."""
    options = options_of(rule, ends)
    values = {name: np.repeat(value, len(STEPS), axis=0) for name, value in options.items()}
    numbers = {name: tuple(v[0].tolist()) if v.ndim == 2 else float(v[0]) for name, v in options.items()}
    one_by_one = np.array([RULES[rule].prepare(numbers, step) for step in STEPS.tolist()], np.float32)
    at_once = RULES[rule].prepare(values, STEPS)
    np.testing.assert_array_max_ulp(one_by_one, at_once, maxulp=1)
    assert (one_by_one != at_once).mean() < 1e-4
