"""The bytes of an optimizer's state: right in each step, and counted anew only where they can have changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from optwatch.hooks import sizes
from optwatch.hooks.sizes import Sizes

State = dict[Any, Any]


class Counting:
    """An optimizer with state, and how often that was counted."""

    def __init__(
        self, kind: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch, **options: Any
    ) -> None:
        self.counts = 0
        count = sizes.state_series

        def counted(*arguments: Any) -> Any:
            self.counts += 1
            return count(*arguments)

        monkeypatch.setattr(sizes, "state_series", counted)
        self.params = [nn.Parameter(torch.ones(8, 40)) for _ in range(12)]
        self.optimizer = kind(self.params, lr=0.1, **options)
        self.sizes = Sizes("it", lambda _: {})
        self.step()

    def step(self) -> float:
        """A step, and the bytes of state after it."""
        for param in self.params:
            param.grad = torch.ones_like(param)
        self.optimizer.step()
        self.sizes.read(self.optimizer, full=False)
        return sum(value for _, value in self.sizes.state)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"fused": True}),
        (
            transformers.optimization.Adafactor,
            {"relative_step": False},
        ),  # its RMS is another tensor in each step
    ],
)
def test_steps_alone_change_nothing(kind: Any, options: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that are others in each step do not make it count."""
    counting = Counting(kind, monkeypatch, **options)
    before = counting.step()
    counts = counting.counts
    assert [counting.step() for _ in range(3)] == [before] * 3
    assert counting.counts == counts


CHANGES: dict[str, tuple[Callable[[State], None], int]] = {
    "another tensor": (lambda kept: kept.update(exp_avg=torch.zeros(8, 40, dtype=torch.float64)), 1280),
    "other memory beneath a tensor": (lambda kept: kept["exp_avg"].set_(torch.zeros(8, 50)[:, :40]), 320),
    "a number of another type": (lambda kept: kept.update(step=kept["step"].double()), 4),
    "a tensor for a number": (lambda kept: kept.update(step=torch.zeros(5)), 16),
    "one more": (lambda kept: kept.update(more=torch.zeros(3)), 12),
    "one less": (lambda kept: kept.pop("exp_avg_sq"), -1280),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("number", [0, 5, 11])
def test_a_change_is_seen_at_once(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whichever parameter, to the byte."""
    change, difference = CHANGES[name]
    counting = Counting(torch.optim.AdamW, monkeypatch)
    before = counting.step()
    change(counting.optimizer.state[counting.params[number]])
    counting.sizes.read(counting.optimizer, full=False)
    assert sum(value for _, value in counting.sizes.state) == before + difference
