"""Stepping in the backward pass: the same bits as step(), and less memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from optwatch.codecs import FORMATS
from optwatch.optim import SGD, AdamW, Lion, StepStats


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 64))
    model[2].bias.requires_grad_(False)
    model[2].weight = nn.Parameter(model[2].weight.t().contiguous().t())
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    gen = torch.Generator().manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 64, generator=gen)).square().mean().backward()
        optimizer.step()


def own(kind: type, model: nn.Module, state: str) -> torch.optim.Optimizer:
    return kind(model.parameters(), lr=1e-2, state=state, backend="reference" if kind is not AdamW else None)


@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize("kind", [AdamW, SGD, Lion])
@pytest.mark.filterwarnings("ignore:.*slow reference backend:RuntimeWarning")
def test_the_same_bits_as_a_plain_step(kind: type, state: str) -> None:
    """Weights and state, over steps before, in and after release."""
    models = network(), network()
    released, plain = (own(kind, model, state) for model in models)
    train(models[0], released, 2)
    end = released.release_gradients()
    train(models[0], released, 5)
    assert all(p.grad is None for p in models[0].parameters())
    end()
    train(models[0], released, 2)
    for steps in (2, 5, 2):
        train(models[1], plain, steps)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)
        for key, value in plain.state.get(b, {}).items():
            assert torch.equal(value, released.state[a][key])


def test_subscribers_hear_one_step() -> None:
    """The rows of all parameters, once a step; full in one of every."""
    model = network()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    heard: list[StepStats] = []
    optimizer.subscribe(heard.append, every=3)
    optimizer.release_gradients()
    train(model, optimizer, 4)
    assert [(stats.step, stats.full, len(stats.plans)) for stats in heard] == [
        (1, True, 5), (2, False, 5), (3, False, 5), (4, True, 5),
    ]  # fmt: skip
    assert sum(p.rows[:, 2].sum() for p in heard[0].plans) > 0
    with pytest.raises(RuntimeError, match="release_gradients\\(\\) is in force already"):
        optimizer.release_gradients()


SCRIPT = """
import re, sys, torch
from torch import nn
from optwatch.optim import AdamW
torch.set_num_threads(1)
model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(12)])
optimizer = AdamW(model.parameters(), state="int8")
if sys.argv[1] == "release":
    optimizer.release_gradients()
for _ in range(2):
    model(torch.ones(1, 2048)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="platform: /proc tells the peak")
def test_gradients_are_never_all_there() -> None:
    """12 gradients of 16 MiB: releasing them as they come lowers the peak by most of their 192 MiB."""
    peak = {}
    for mode in ("plain", "release"):
        # A fixed threshold makes glibc give large blocks back at once: what is counted is what is alive.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True, env=environment
        )
        peak[mode] = int(re.findall(r"\d+", run.stdout)[-1]) / 1024
    assert peak["plain"] - peak["release"] > 120, peak
