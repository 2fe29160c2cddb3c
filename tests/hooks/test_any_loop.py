"""Whatever a training loop looks like, around our optimizers and others': every step is counted, no bit is changed."""

from __future__ import annotations

import gc
import hashlib
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import pytest
import pytorch_optimizer
import torch
import torchao.optim
import transformers.optimization
from torch import nn

import optwatch
from hooks.boards import published
from optwatch.optim import AdamW

Made = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

#: One optimizer of every package, and of ours one for each way to keep state.
OPTIMIZERS: dict[str, Made] = {
    "optwatch int8": lambda params: AdamW(params, lr=1e-2, state="int8"),
    "optwatch fp32": lambda params: AdamW(params, lr=1e-2),
    "torch": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "torch fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "bitsandbytes": lambda params: bitsandbytes.optim.AdamW8bit(params, lr=1e-2),
    "torchao": lambda params: torchao.optim.AdamW8bit(params, lr=1e-2),
    "transformers": lambda params: transformers.optimization.Adafactor(params, lr=1e-2, relative_step=False),
    "pytorch_optimizer": lambda params: pytorch_optimizer.AdaBelief(params, lr=1e-2),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
STEPS = 6

pytestmark = pytest.mark.usefixtures("eager")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 64))


def backward(model: nn.Module, number: int, scale: float = 1.0) -> None:
    batch = torch.randn(4, 64, generator=torch.Generator().manual_seed(number))
    (model(batch).square().mean() * scale).backward()


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    optimizer.zero_grad()
    backward(model, number)
    optimizer.step()


def digest(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


# --- loops: each trains some models with some optimizers, and says how many steps each of these took ----------------


def in_one_thread(models: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> list[int]:
    for number in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            one_step(model, optimizer, number)
    return [STEPS] * len(models)


def a_thread_each(models: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> list[int]:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for number in range(STEPS):
            one_step(model, optimizer, number)

    threads = [threading.Thread(target=train, args=pair) for pair in zip(models, optimizers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [STEPS] * len(models)


def a_thread_a_step(models: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> list[int]:
    for number in range(STEPS):
        for pair in zip(models, optimizers, strict=True):
            thread = threading.Thread(target=one_step, args=(*pair, number))
            thread.start()
            thread.join()
    return [STEPS] * len(models)


def accumulated(models: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> list[int]:
    for number in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            for part in range(3):
                backward(model, 10 * number + part, scale=1 / 3)
            optimizer.step()
            optimizer.zero_grad()
    return [STEPS] * len(models)


def some_without_gradients(models: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> list[int]:
    for number in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            backward(model, number)
            if number % 2:
                model[0].bias.grad = None
            optimizer.step()
    return [STEPS] * len(models)


def gradients_kept_in_place(models: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> list[int]:
    for number in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad(set_to_none=False)
            backward(model, number)
            optimizer.step()
    return [STEPS] * len(models)


LOOPS = (
    in_one_thread,
    a_thread_each,
    a_thread_a_step,
    accumulated,
    some_without_gradients,
    gradients_kept_in_place,
)


@every_optimizer
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_two_optimizers_in_a_loop(directory: Path, make: Made, loop: Callable[..., list[int]]) -> None:
    """Both count all their steps, nothing fails in watching, and the weights are those of an unwatched loop."""
    found = []
    for watched in (True, False):
        models = [network(seed) for seed in (1, 2)]
        optimizers = [make(list(model.parameters())) for model in models]
        if watched:
            with optwatch.watch(optimizers, every=3, directory=directory, agent=False):
                steps = loop(models, optimizers)
                counters = published(directory).counters
                gauges = published(directory).gauges
        else:
            loop(models, optimizers)
        found.append([digest(model) for model in models])
    assert found[0] == found[1]
    name = type(optimizers[0]).__name__
    assert [counters["steps", f"{name} {number}"] for number in (1, 2)] == steps
    for number in (1, 2):
        assert counters["adapter_errors", f"{name} {number}"] == 0
        assert counters["nonfinite_elements", f"{name} {number}"] == 0
        assert any(key[:2] == ("optimizer.state", f"{name} {number}") for key in gauges)


@every_optimizer
def test_made_and_dropped(directory: Path, make: Made) -> None:
    """Five, one after the other: each is forgotten with its state, and the next takes its name."""
    first = network()
    lasting = make(list(first.parameters()))
    with optwatch.watch(lasting, every=2, directory=directory, agent=False) as watch:
        one_step(first, lasting, 0)
        gone = []
        for number in range(5):  # each collects garbage, which takes long in a process with many tests
            model = network(number)
            optimizer = make(list(model.parameters()))
            watch.add(optimizer)
            one_step(model, optimizer, 0)
            gone += [weakref.ref(optimizer), weakref.ref(model[0].weight)]
            del model, optimizer
            gc.collect()
        assert [one() for one in gone] == [None] * len(gone)
        one_step(first, lasting, 1)
        steps = {key[1]: value for key, value in published(directory).counters.items() if key[0] == "steps"}
    assert steps == {type(lasting).__name__: 2}


@every_optimizer
def test_steps_that_a_scaler_leaves_out(directory: Path, make: Made) -> None:
    """Two of five: counted as skipped, whoever decides it."""
    model = network()
    optimizer = make(list(model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with optwatch.watch(optimizer, every=2, directory=directory, agent=False):
        for number in range(5):
            optimizer.zero_grad()
            batch = torch.full((2, 64), float("inf") if number in (1, 3) else 1.0)
            scaler.scale(model(batch).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        counters = published(directory).counters
    assert counters["steps_skipped", type(optimizer).__name__] == 2


@every_optimizer
def test_memory_does_not_grow_with_steps(directory: Path, make: Made) -> None:
    """After the first sampled steps no more objects are kept than an unwatched loop keeps, of tensors none at all."""

    def kept() -> tuple[int, int]:
        gc.collect()
        known = gc.get_objects()
        return sum(issubclass(type(one), torch.Tensor) for one in known), len(known)

    def growth() -> tuple[int, int]:
        for number in range(6):
            one_step(model, optimizer, number)
        before = kept()
        for number in range(60):
            one_step(model, optimizer, number)
        after = kept()
        return after[0] - before[0], after[1] - before[1]

    model = network()
    optimizer = make(list(model.parameters()))
    unwatched = growth()
    with optwatch.watch(optimizer, every=3, directory=directory, agent=False):
        tensors, objects = growth()
    assert tensors <= unwatched[0]
    assert objects <= unwatched[1] + 20  # what Python itself keeps: caches of types and code
