"""Storage formats under gradients that are hard on them, through the public optimizer and against torch's exact one."""

from __future__ import annotations

import pytest
import torch

from optwatch.optim import AdamW
from tests.scenarios import BETA1, BETA2, EPS, SCENARIOS, compare, drift

BACKENDS = ("cpu", "reference")


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    """Tensors of 4096 elements are no work for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(state: str, backend: str) -> object:
    def optimizer(param: torch.Tensor) -> AdamW:
        return AdamW(
            [param], lr=1.0, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0, state=state, backend=backend
        )

    return optimizer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_int8_keeps_the_update(name: str, backend: str) -> None:
    """The update stays within the scenario's error; neither its size nor its largest element explodes."""
    result = compare(make("int8", backend), SCENARIOS[name])
    assert result.nrmse <= SCENARIOS[name].limit
    assert 0.95 < result.rms < 1.05
    assert 0.8 < result.largest < 1.25


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [0.0, 1.5, 3.0, 5.0])
def test_int8_does_not_bias_a_long_average(spread: float, backend: str) -> None:
    """The mean of stored over exact second moment after 4,000 steps."""
    assert 0.97 <= drift(make("int8", backend), spread) <= 1.03


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_follows_a_slow_average(backend: str) -> None:
    """Rounded to nearest, a second moment in bf16 would stand still at twice its value."""
    assert 0.97 <= drift(make("bf16", backend), 1.5) <= 1.03


def test_bytes_a_parameter() -> None:
    """int8 state takes at most 2.05 bytes a parameter, all of it counted."""
    param = torch.nn.Parameter(torch.zeros(1 << 20))
    optimizer = AdamW([param], state="int8")
    param.grad = torch.randn_like(param)
    optimizer.step()
    assert sum(optimizer.state_bytes().values()) / param.numel() <= 2.05
