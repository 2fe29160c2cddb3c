"""Sums over tensors that belong to no plan: float64's to 1e-6, the same for any threads, and nothing read amiss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kernels.isas import isa  # noqa: F401 - a fixture
from optwatch.kernels.cpu.library import PATH
from optwatch.kernels.cpu.sums import gradient_sums

pytestmark = [
    pytest.mark.skipif(not PATH.exists(), reason="built without a compiler: there is no library to test"),
    pytest.mark.usefixtures("isa"),
]

#: Below, at and beyond vectors, blocks and work items, and nothing at all.
SIZES = (0, 1, 31, 512, 513, 70_000, 300_001)
#: What gradients are multiplied by: squares leave the range of fp32 at both ends.
SCALES = (1.0, 1e-30, 1e30)


def sums(tensors: list[torch.Tensor | None]) -> np.ndarray:
    rows = np.full((len(tensors), 3), 7.0)
    assert gradient_sums(tensors, rows)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", SCALES)
def test_squares_equal_float64(dtype: torch.dtype, scale: float) -> None:
    """For every length and magnitude, and at addresses that are no multiple of a vector."""
    gen = torch.Generator().manual_seed(0)
    tensors = [(torch.randn(n + 1, generator=gen) * scale).to(dtype)[1:] for n in SIZES]
    expected = [t.double().square().sum().item() for t in tensors]
    rows = sums(tensors)
    assert rows[:, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert rows[:, 1].tolist() == [0.0] * len(SIZES)


def test_what_is_not_finite_is_counted() -> None:
    """NaN and both infinities, at the first and the last element, too; the finite rest has a sum of its own."""
    tensor = torch.full((70_001,), 0.5)
    tensor[0], tensor[513], tensor[-1] = math.nan, math.inf, -math.inf
    given, count, finite = sums([torch.ones(3), tensor])[1]
    assert math.isnan(given)
    assert count == 3
    assert finite == pytest.approx((70_001 - 3) / 4)


def test_types_orders_and_gaps_in_the_list() -> None:
    """Both types at once, transposed and channels_last ones, and none where there is no gradient."""
    gen = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(70, 90, generator=gen).t(),
        None,
        torch.randn(4000, generator=gen).bfloat16(),
        torch.randn(4, 8, 5, 5, generator=gen).to(memory_format=torch.channels_last),
        None,
    ]
    expected = [0.0 if t is None else t.double().square().sum().item() for t in tensors]
    assert sums(tensors)[:, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert sums([None, None]).tolist() == [[0.0] * 3] * 2


def test_the_same_for_any_number_of_threads() -> None:
    """Bit by bit."""
    gen = torch.Generator().manual_seed(2)
    tensors = [torch.randn(n, generator=gen) for n in SIZES]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(sums(tensors))
    finally:
        torch.set_num_threads(before)
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(8)[::2],
        torch.ones(3, 3)[:, :2],
        torch.ones(2).expand(4, 2),
        torch.ones(3).half(),
        torch.ones(3).to_sparse(),
        torch.ones(3, device="meta"),
        torch.nn.Parameter(torch.ones(3)),
    ],
    ids=["strided", "cut", "expanded", "fp16", "sparse", "meta", "subclass"],
)
def test_what_it_cannot_read_it_does_not_touch(tensor: torch.Tensor) -> None:
    """The caller has another way."""
    rows = np.full((2, 3), 7.0)
    assert not gradient_sums([torch.ones(2), tensor], rows)
    assert (rows == 7.0).all()


def test_rows_of_another_shape_are_refused() -> None:
    """Before anything is written."""
    with pytest.raises(ValueError, match=r"expected rows of shape \(1, 3\), got \(1, 2\)"):
        gradient_sums([torch.ones(2)], np.zeros((1, 2)))
