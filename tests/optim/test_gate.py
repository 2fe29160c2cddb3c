"""Clipping, loss scaling and non-finite gradients inside the step: what the same before a plain step would give."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optwatch import optim
from optwatch.codecs import FORMATS
from optwatch.kernels.plan import DECISION
from optwatch.optim import StepStats
from optwatch.rules import RULES
from tests.kernels.agreement import formats
from tests.optim.test_oracles import ROWS, Row, backends_of
from tests.optim.training import BACKENDS, assert_same, give_gradients, parameters

#: One row for each optimizer, and each backend that has it.
EVERY = {row.ours.__name__: row for row in ROWS}
ON_BACKENDS = [
    pytest.param(row, name, id=f"{kind}-{name}") for kind, row in EVERY.items() for name in backends_of(row)
]
NORM = 100.0  # of parameters() with normal gradients it is 230


def grouped(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups that differ in an option, and so do not in their share of the norm."""
    return [{"params": params[::2]}, {"params": params[1::2], "lr": 3e-3}]


def same_state(a: optim.Optimizer, b: optim.Optimizer) -> bool:
    """Whether every tensor of the states is equal, bit by bit, step counts included."""
    states = [list(optimizer.state_dict()["state"].values()) for optimizer in (a, b)]
    return all(
        x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
        for x, y in zip(*states, strict=True)
    )


@pytest.mark.parametrize("rule", RULES.values(), ids=str)
def test_the_first_scalar_multiplies_the_gradient(rule: Any) -> None:
    """That is the one the kernels multiply by the factor of clipping."""
    assert rule.scalars[0] == "grad_scale"


def clip(params: list[nn.Parameter], limit: float) -> float:
    """Clip the gradients as torch does, in fp32 whatever their type, and return the norm."""
    exact = [nn.Parameter(p.detach().float()) for p in params]
    for q, p in zip(exact, params, strict=True):
        q.grad = p.grad.float()
    norm = torch.nn.utils.clip_grad_norm_(exact, limit)
    for q, p in zip(exact, params, strict=True):
        p.grad = q.grad.to(p.dtype)
    return float(norm)


@pytest.mark.parametrize(("row", "name"), ON_BACKENDS)
def test_clips_as_torch_does(row: Row, name: str) -> None:
    """One norm over groups, layouts and types. The limit is a quarter of it, so torch rounds no bf16 gradient."""
    ours, theirs = ([*parameters(), *parameters(torch.bfloat16, seed=1)] for _ in range(2))
    optimizer = row.ours(grouped(ours), **row.options, backend=name, max_grad_norm=1.0)
    plain = row.ours(grouped(theirs), **row.options, backend=name)
    decisions: list[list[float]] = []
    optimizer.subscribe(lambda stats: decisions.append(stats.decision.tolist()))
    for step in range(4):
        for params in (ours, theirs):
            give_gradients(params, step)
        given = [p.grad.clone() for p in ours]
        optimizer.max_grad_norm = clip(theirs, math.inf) * (2 if step == 2 else 0.25)
        norm = clip(theirs, optimizer.max_grad_norm)
        optimizer.step()
        plain.step()
        assert all(torch.equal(p.grad, before) for p, before in zip(ours, given, strict=True))
        assert decisions[-1][0] == pytest.approx(norm, rel=1e-5)
        assert decisions[-1][1] == pytest.approx(1 if step == 2 else 0.25, rel=1e-5)
    fp32 = len(parameters())
    assert_same(ours[:fp32], theirs[:fp32], rtol=1e-5, atol=1e-6)
    if row.ours is not optim.Lion:  # among bf16 gradients some cancel, and its sign hangs on their last bit
        assert_same(ours[fp32:], theirs[fp32:], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_goes_through_unless_told_otherwise(value: float, name: str) -> None:
    """As after clip_grad_norm_(error_if_nonfinite=False): a NaN makes all NaN, an infinity the rest zero."""
    ours, theirs = parameters(), parameters()
    optimizer = optim.SGD(ours, lr=0.1, backend=name, max_grad_norm=NORM)
    oracle = torch.optim.SGD(theirs, lr=0.1)
    for params in (ours, theirs):
        give_gradients(params, 0)
        params[1].grad[7] = value
    torch.nn.utils.clip_grad_norm_(theirs, NORM)
    optimizer.step()
    oracle.step()
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.filterwarnings("ignore:.*slow reference backend:RuntimeWarning")
def test_watching_changes_no_bit(state: str, name: str) -> None:
    """Clipped with and without full statistics."""
    optimizers = []
    for watched in (False, True):
        params = parameters()
        optimizer = optim.AdamW(
            params, state=state, max_grad_norm=NORM, nonfinite="zero", backend=backend_of(state, name)
        )
        if watched:
            optimizer.subscribe(lambda stats: None)
        for step in range(5):
            give_gradients(params, step)
            params[0].grad[3] = math.inf
            optimizer.step()
        optimizers.append((params, optimizer))
    (a, first), (b, second) = optimizers
    assert_same(a, b, rtol=0, atol=0)
    assert same_state(first, second)


def backend_of(state: str, name: str) -> str | None:
    """The backend, or the best there is where it has no kernels for the format."""
    return name if state in formats(name) else None


def poisoned(params: list[nn.Parameter], step: int, bad: range) -> None:
    """Gradients, which in the steps ``bad`` are not finite in two parameters."""
    give_gradients(params, step)
    if step in bad:
        params[0].grad.view(-1)[5] = math.nan
        params[3].grad.fill_(-math.inf)


@pytest.mark.parametrize("mode", ["skip", "raise"])
@pytest.mark.parametrize(("row", "name"), ON_BACKENDS)
def test_a_skipped_step_was_never_taken(row: Row, name: str, mode: str) -> None:
    """Weights, state, step counts and random numbers are those of a run without the bad steps."""
    ours, theirs = parameters(), parameters()
    optimizer = row.mine(ours, backend=name, state="int8", nonfinite=mode)
    plain = row.mine(theirs, backend=name, state="int8")
    heard: list[StepStats] = []
    optimizer.subscribe(heard.append)
    bad = range(2, 4)
    for step in range(6):
        poisoned(ours, step, bad)
        if mode == "raise" and step - 1 in bad:
            with pytest.raises(RuntimeError, match=r"not finite.*: parameter 0 of group 0.*, parameter 3 of"):
                optimizer.step()
        optimizer.step()
        if step not in bad:
            give_gradients(theirs, step)
            plain.step()
        assert_same(ours, theirs, rtol=0, atol=0)
        assert same_state(optimizer, plain)
        rows = torch.cat([plan.rows[:, :4] for plan in heard[-1].plans])
        assert heard[-1].decision[DECISION.index("skipped")] == (step in bad)
        assert rows[:, 1].sum() == (2 if step in bad else 0)
        assert rows[:, 2:].any() == (step not in bad)


@pytest.mark.parametrize(("row", "name"), ON_BACKENDS)
def test_zero_replaces_what_is_not_finite(row: Row, name: str) -> None:
    """And clips by the norm of the others."""
    ours, theirs = parameters(), parameters()
    optimizer = row.mine(ours, backend=name, nonfinite="zero", max_grad_norm=NORM)
    plain = row.mine(theirs, backend=name)
    heard: list[StepStats] = []
    optimizer.subscribe(heard.append)
    for step in range(4):
        for params in (ours, theirs):
            poisoned(params, step, range(1, 3))
        for p in theirs:
            p.grad.nan_to_num_(0, 0, 0)
        norm = clip(theirs, NORM)
        optimizer.step()
        plain.step()
        assert heard[-1].decision[0] == pytest.approx(norm, rel=1e-5)
        assert heard[-1].plans[0].rows[:, 1].sum() == (2 if step in range(1, 3) else 0)
        assert heard[-1].plans[0].rows[:, 0].isfinite().all() == (step not in range(1, 3))
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("unscale", [False, True])
def test_a_loss_scaler(name: str, unscale: bool) -> None:
    """GradScaler's factor is undone in the step, a step that overflows is not taken, the norm is without the factor."""
    ours, theirs = parameters(), parameters()
    optimizer = optim.AdamW(ours, backend=name, max_grad_norm=NORM)
    oracle = torch.optim.AdamW(theirs)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    heard: list[StepStats] = []
    optimizer.subscribe(heard.append)
    for step in range(6):
        for params, scaler in zip((ours, theirs), scalers, strict=True):
            give_gradients(params, step)
            for p in params:
                p.grad *= scaler.get_scale()
            if step == 3:
                params[2].grad[0] = math.inf
            scaler.scale(torch.ones(()))  # as a training loop does, which makes the scale
        if unscale:
            scalers[0].unscale_(optimizer)
        scalers[0].step(optimizer)
        scalers[0].update()
        scalers[1].unscale_(oracle)
        norm = torch.nn.utils.clip_grad_norm_(theirs, NORM)
        scalers[1].step(oracle)
        scalers[1].update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        if step != 3:
            assert heard[-1].decision[0] == pytest.approx(float(norm), rel=1e-5)
            assert float(heard[-1].plans[0].rows[:, 0].sum().sqrt()) == pytest.approx(float(norm), rel=1e-5)
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)
    assert optimizer.state[ours[0]]["step"] == oracle.state[theirs[0]]["step"] == 5


def test_copies_keep_the_settings() -> None:
    """They belong to the optimizer, and are in no checkpoint."""
    params = parameters()
    optimizer = optim.AdamW(params, max_grad_norm=1.0, nonfinite="skip")
    other = copy.deepcopy(optimizer)
    assert (other.max_grad_norm, other.nonfinite) == (1.0, "skip")
    assert "max_grad_norm" not in str(optimizer.state_dict())


def scaled(optimizer: optim.Optimizer) -> None:
    """What a scaler does before a step."""
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: optim.SGD(p, max_grad_norm=-1.0),
            "max_grad_norm=-1.0: expected a number greater than 0, or",
        ),
        (
            lambda p: optim.SGD(p, max_grad_norm=math.nan),
            "max_grad_norm=nan: expected a number greater than 0",
        ),
        (
            lambda p: optim.SGD(p, nonfinite="ignore"),
            "nonfinite='ignore': use one of 'skip', 'raise', 'zero'",
        ),
        (
            lambda p: optim.SGD(p, max_grad_norm=1.0).release_gradients(),
            "release_gradients() and max_grad_norm exclude each other",
        ),
        (
            lambda p: optim.SGD(p, nonfinite="zero").release_gradients(),
            "release_gradients() and nonfinite exclude each other",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[list[nn.Parameter]], Any], message: str) -> None:
    """By name, before a step is taken."""
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
        make(parameters())


def test_a_scaler_and_release_are_refused() -> None:
    """At the first step with a scaler: the one knows nothing of the other before."""
    optimizer = optim.SGD(parameters())
    optimizer.release_gradients()
    scaled(optimizer)
    with pytest.raises(RuntimeError, match=r"release_gradients\(\) and a loss scaler exclude each other"):
        optimizer.step()


@pytest.mark.parametrize("name", ["cpu"])
def test_clipping_takes_no_memory_of_a_parameters_size(name: str) -> None:
    """Neither for the norm nor for the clipped gradient, which is never written."""
    param = nn.Parameter(torch.randn(1 << 20))
    optimizer = optim.LAMB([param], state="int8", backend=name, max_grad_norm=1.0, nonfinite="zero")
    param.grad = torch.randn(1 << 20)
    optimizer.step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        optimizer.step()
        torch.empty(1 << 18)
    taken = [event.cpu_memory_usage for event in profile.events()]
    assert max(taken) == 1 << 20, "of a quarter of the parameter, and the only one that large"
    assert sum(size > 1 << 16 for size in taken) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "skip", "zero", "raise"])
def test_nothing_waits_for_the_device(mode: str | None) -> None:
    """Torch raises for whatever would, over steps that clip, and skip if they may."""
    params = [nn.Parameter(torch.randn(5000, device="cuda")) for _ in range(3)]
    optimizer = optim.AdamW(params, state="int8", max_grad_norm=1.0, nonfinite=mode)
    grads = [[torch.randn_like(p) for p in params] for _ in range(6)]
    if mode is not None:
        grads[2][1][7] = math.nan
    step_once = forgiving(optimizer.step) if mode == "raise" else optimizer.step
    for step, given in enumerate(grads):
        for p, grad in zip(params, given, strict=True):
            p.grad = grad
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        step_once()
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in params)
    if mode in ("skip", "raise"):
        assert optimizer.state_dict()["state"][0]["step"] < 6


def forgiving(step: Callable[[], None]) -> Callable[[], None]:
    """``step`` without the error of the one before."""

    def stepping() -> None:
        try:
            step()
        except RuntimeError as error:
            if "were not finite" not in str(error):
                raise

    return stepping
