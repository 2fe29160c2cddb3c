"""Weight formats in training: what a split weight follows, where it is kept, and what writes from outside do to it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optwatch.optim
from optwatch.codecs import WEIGHTS
from optwatch.optim import LAMB, SGD, AdamW, Lion, Optimizer, StateKind, StepStats
from tests.optim.training import BACKENDS, assert_same, give_gradients, parameters, train

BF16 = torch.bfloat16
SPLIT = ("split8", "split16")
KEY = "weight_correction"


def seen(masters: list[nn.Parameter]) -> list[Tensor]:
    """The bf16 nearest to each fp32 weight, ties away from zero."""
    bits = [master.detach().contiguous().view(torch.int32) for master in masters]
    return [(b + 0x8000 >> 16).to(torch.int16).view(BF16) for b in bits]


def twins() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """bf16 parameters, and fp32 ones that start at the same values, of the same memory order."""
    params = parameters(BF16)
    return params, [nn.Parameter(p.detach().float()) for p in params]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", ["fp32", "int8"])
@pytest.mark.parametrize("kind", [AdamW, SGD, Lion, LAMB])
def test_split16_is_fp32_training_bit_by_bit(kind: type[Optimizer], state: str, backend: str) -> None:
    """The same steps as with fp32 parameters; the bf16 ones are always the nearest."""
    params, masters = twins()
    optimizer = kind(params, lr=1e-3, state=state, weights="split16", backend=backend)
    oracle = kind(masters, lr=1e-3, state=state, backend=backend)
    for step in range(6):
        give_gradients(params, step)
        for param, master in zip(params, masters, strict=True):
            master.grad = param.grad.float()
        optimizer.step()
        oracle.step()
        for param, nearest in zip(params, seen(masters), strict=True):
            assert torch.equal(param, nearest)
    exact = optimizer.master_state_dict()
    for name, master in oracle.master_state_dict().items():
        assert torch.equal(exact[name], master)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_optimizer_and_layout(weights: str) -> None:
    """State has the parameter's strides, its bytes are those that were asked for, and training moves the weights."""
    for kind in (getattr(optwatch.optim, name) for name in optwatch.optim.__all__):
        if not (isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer):
            continue
        params = parameters(BF16)
        optimizer = kind(params, weights=weights, backend="cpu")
        train(optimizer, params, range(2))
        assert optimizer.state_bytes() == optimizer.expected_state_bytes()
        for param in params:
            assert (KEY in optimizer.state[param]) == (weights in SPLIT)
            if weights in SPLIT and param.is_contiguous():
                assert optimizer.state[param][KEY].stride() == param.stride()
        bits = {"split8": 8, "split16": 16}.get(weights, 0)
        beside = sum(n for kind_, n in optimizer.state_bytes().items() if kind_.slot == KEY)
        assert beside == sum(p.numel() for p in params) * bits // 8


def drift(weights: str, lr: float) -> tuple[float, float]:
    """After 200 steps of AdamW: the error of the way gone, and the share of it, against exact weights."""
    gen = torch.Generator().manual_seed(0)
    start = (0.1 * torch.randn(20_000, generator=gen)).to(BF16)
    signal = 0.1 * torch.randn(20_000, generator=gen)
    param, exact = nn.Parameter(start.clone()), nn.Parameter(start.double())
    ours = AdamW([param], lr=lr, weight_decay=0.0, weights=weights, backend="cpu")
    oracle = torch.optim.AdamW([exact], lr=lr, weight_decay=0.0)
    for _ in range(200):
        param.grad = (signal + torch.randn(20_000, generator=gen)).to(BF16)
        exact.grad = param.grad.double()
        ours.step()
        oracle.step()
    went = ours.master_state_dict()["0"].double() - start.double()
    way = exact.detach() - start.double()
    return float((went - way).norm() / way.norm()), float((went * way.sign()).sum() / way.abs().sum())


@pytest.mark.parametrize("lr", [1e-5, 1e-6])
def test_small_learning_rates(lr: float) -> None:
    """Where bf16 weights stay where they are, all formats move as far as exact ones; the split ones near them."""
    found = {weights: drift(weights, lr) for weights in WEIGHTS}
    assert found["native"][1] < 0.05
    for weights in ("stochastic", "split8", "split16"):
        assert found[weights][1] == pytest.approx(1, abs=0.1 if weights == "stochastic" else 0.01)
    assert found["split8"][0] < (0.1 if lr == 1e-5 else 0.5) < found["native"][0]
    assert found["split16"][0] < 0.01


def test_stochastic_weights_are_right_on_average() -> None:
    """Over 400 seeds, to five standard deviations."""
    start, gradient = torch.linspace(-2, 2, 1000).to(BF16), torch.linspace(1e-4, 3e-3, 1000)
    total = torch.zeros(1000, dtype=torch.float64)
    for seed in range(400):
        param = nn.Parameter(start.clone())
        param.grad = gradient.to(BF16)
        SGD([param], lr=1.0, weights="stochastic", seed=seed, backend="cpu").step()
        total += param.detach().double()
    expected = start.double() - gradient.to(BF16).double()
    unit = 2.0 ** (start.double().abs().clamp(min=1e-3).log2().floor() - 7)
    assert ((total / 400 - expected).abs() <= 5 * 0.5 * unit / 20 + 1e-7).all()
    assert ((total / 400 - expected).mean().abs() <= 5 * 0.5 * unit.mean() / (20 * 1000**0.5)).all()


class TestWritesFromOutside:
    """The parameter is the user's."""

    @pytest.mark.parametrize("weights", SPLIT)
    @pytest.mark.parametrize(
        "write",
        [
            lambda p: p.clamp_(-0.5, 0.5),
            lambda p: p.zero_(),
            lambda p: p.copy_(torch.linspace(-3, 3, p.numel()).view(p.shape)),
            lambda p: p.mul_(-1e-30),
        ],
        ids=["clamp", "zero", "load", "scale"],
    )
    def test_is_what_training_goes_on_from(self, weights: str, write: Callable[[Tensor], object]) -> None:
        """The weight is the value written, to half a unit in its last place, and seen as written."""
        param = nn.Parameter(torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(BF16))
        optimizer = SGD([param], lr=1e-3, weights=weights)
        train(optimizer, [param], range(3))
        with torch.no_grad():
            write(param)
        written = param.detach().clone()
        exact = optimizer.master_state_dict()["0"]
        assert (exact - written.float()).abs().le(2.0**-8 * written.float().abs() + 2.0**-133).all()
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert torch.equal(param.detach(), written)
        assert torch.equal(optimizer.master_state_dict()["0"], exact)

    @pytest.mark.parametrize("weights", SPLIT)
    def test_a_change_of_memory_format_keeps_the_correction(self, weights: str) -> None:
        """Laid into the new order, value by value."""
        param = nn.Parameter(torch.randn(8, 64, 3, 3).to(BF16))
        optimizer = SGD([param], lr=1e-3, weights=weights)
        train(optimizer, [param], range(3))
        before = optimizer.master_state_dict()["0"]
        param.data = param.data.to(memory_format=torch.channels_last)
        assert torch.equal(optimizer.master_state_dict()["0"], before)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert torch.equal(optimizer.master_state_dict()["0"], before)
        assert optimizer.state[param][KEY].is_contiguous(memory_format=torch.channels_last)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def reloaded(pair: tuple[Optimizer, list[nn.Parameter]]) -> tuple[Optimizer, list[nn.Parameter]]:
    """Another optimizer, of copies of the parameters, that loads what the first one saves."""
    first, params = pair
    others = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
    second = AdamW(others, state="int8", weights=first.param_groups[0]["weights"], backend="cpu")
    second.load_state_dict(through_a_file(first.state_dict()))
    return second, others


class TestCheckpoints:
    """The correction is state like any other."""

    @pytest.mark.parametrize("weights", ["stochastic", *SPLIT])
    @pytest.mark.parametrize(
        "copied",
        [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair)), reloaded],
        ids=["deepcopy", "pickle", "file"],
    )
    def test_continue_bit_by_bit(self, weights: str, copied: Callable[[Any], Any]) -> None:
        """A copy, a pickle and a file."""
        params = parameters(BF16)
        first = AdamW(params, lr=1e-4, state="int8", weights=weights, backend="cpu")
        train(first, params, range(3))
        second, others = copied((first, params))
        train(first, params, range(3, 6))
        train(second, others, range(3, 6))
        assert_same(params, others, rtol=0, atol=0)
        for a, b in zip(*(o.master_state_dict().values() for o in (first, second)), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("old", ["native", *SPLIT])
    @pytest.mark.parametrize("new", WEIGHTS)
    def test_another_format_is_refused_or_converted(self, old: str, new: str) -> None:
        """By name; converted, the weight stays as near to what it was as the new format can hold."""
        param = nn.Parameter(torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(BF16))
        source = SGD([("w", param)], weights=old)
        train(source, [param], range(3))
        target = SGD([("w", param)], weights=new)
        state = through_a_file(source.state_dict())
        if (old if old in SPLIT else None) != (new if new in SPLIT else None):
            with pytest.raises(
                ValueError, match=f"state of parameter 'w' does not fit: it has .* weights='{new}'"
            ):
                target.load_state_dict(state)
            assert not target.state
            target.load_state_dict(state, convert=True)
            assert target.state_conversions == 1
        else:
            target.load_state_dict(state)
        exact, kept = (o.master_state_dict()["w"] for o in (source, target))
        unit = 2.0 ** (exact.abs().log2().floor() - 7)
        lost = {"native": 0.5, "stochastic": 0.5, "split8": 2.0**-8, "split16": 0.0}[new]
        assert ((kept - exact).abs() <= (0.5 if old == "native" and new not in SPLIT else lost) * unit).all()
        param.grad = torch.zeros_like(param)
        target.step()
        assert target.state_bytes() == target.expected_state_bytes()

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (
                lambda s: s.update({KEY: s[KEY][:-1]}),
                r"'weight_correction' should be a tensor of shape \(500,\), found",
            ),
            (lambda s: s.update({KEY: s[KEY].float()}), "'weight_correction' has dtype torch.float32"),
            (lambda s: s.update({KEY: 3}), "should be a tensor of shape .*, found int"),
            (lambda s: s.pop(KEY), "it has no correction of the weight, and weights='split8'"),
        ],
    )
    def test_damage_is_refused(self, damage: Callable[[dict[str, Any]], object], message: str) -> None:
        """By a loader, and of the first three where somebody did it to optimizer.state."""
        param = nn.Parameter(torch.ones(500, dtype=BF16))
        optimizer = SGD([("w", param)], weights="split8")
        train(optimizer, [param], range(1))
        state = copy.deepcopy(optimizer.state_dict())
        damage(state["state"][0])
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        damage(optimizer.state[param])
        if KEY in optimizer.state[param]:
            with pytest.raises(ValueError, match=message):
                train(optimizer, [param], range(1))
        else:  # what is found is followed, and does not add up to what was asked for
            train(optimizer, [param], range(1))
            assert optimizer.state_bytes() != optimizer.expected_state_bytes()


class TestOptions:
    """weights= as an option of the constructor and of a group."""

    def test_groups_may_differ(self) -> None:
        """And a group added later; fp32 parameters keep nothing in any."""
        params = [nn.Parameter(torch.ones(100, dtype=dtype)) for dtype in (BF16, BF16, torch.float32, BF16)]
        optimizer = AdamW(
            [{"params": params[:1]}, {"params": params[1:3], "weights": "split16"}], weights="split8"
        )
        train(optimizer, params[:3], range(2))
        optimizer.add_param_group({"params": params[3:], "weights": "native"})
        train(optimizer, params, range(2))
        found = [optimizer.state[param].get(KEY) for param in params]
        assert [None if f is None else f.dtype for f in found] == [torch.int8, torch.int16, None, None]
        assert optimizer.state_bytes() == optimizer.expected_state_bytes()
        assert optimizer.state_bytes()[StateKind(KEY, "int16", "cpu")] == 200

    def test_changed_between_steps(self) -> None:
        """Native and stochastic keep the same, so a group may change between them; a correction stays in use."""
        param = nn.Parameter(torch.ones(5000, dtype=BF16))
        optimizer = SGD([param], lr=1e-4)
        train(optimizer, [param], range(1))
        assert (param == 1).float().mean() > 0.9
        optimizer.param_groups[0]["weights"] = "stochastic"
        train(optimizer, [param], range(1))
        assert (param != 1).float().mean() > 0.005

    def test_unknown(self) -> None:
        """Refused with the names that are known."""
        with pytest.raises(
            ValueError, match="unknown weight format 'split4': use one of 'native', 'stochastic'"
        ):
            AdamW([nn.Parameter(torch.ones(3))], weights="split4")

    def test_names(self) -> None:
        """The fp32 view has the model's own, also before the first step."""
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(BF16)
        optimizer = AdamW(model.named_parameters(), weights="split8")
        exact = optimizer.master_state_dict()
        assert exact.keys() == model.state_dict().keys()
        model.float().load_state_dict(exact)

    def test_tied_weights_and_release(self) -> None:
        """One correction for one parameter; stepping in the backward pass gives the same bits."""

        def run(release: bool) -> tuple[nn.Module, Optimizer]:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False)).to(
                BF16
            )
            model[2].weight = model[0].weight
            optimizer = AdamW(model.parameters(), weights="split8")
            if release:
                optimizer.release_gradients()
            for step in range(4):
                optimizer.zero_grad()
                model(torch.full((2, 8), 0.1 * step, dtype=BF16)).square().sum().backward()
                optimizer.step()
            return model, optimizer

        (model, plain), (_, released) = run(False), run(True)
        assert plain.state_bytes()[StateKind(KEY, "int8", "cpu")] == model[0].weight.numel()
        assert torch.equal(plain.master_state_dict()["0"], released.master_state_dict()["0"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", SPLIT)
def test_a_skipped_step_leaves_the_correction(weights: str, backend: str) -> None:
    """Every bit of it, and of the parameter."""
    param = nn.Parameter(torch.linspace(-1, 1, 5003).to(BF16))
    optimizer = AdamW([param], lr=1e-4, weights=weights, nonfinite="skip", backend=backend)
    train(optimizer, [param], range(3))
    before = param.detach().clone(), optimizer.state[param][KEY].clone()
    param.grad = torch.full_like(param, torch.nan)
    optimizer.step()
    assert torch.equal(param.detach(), before[0])
    assert torch.equal(optimizer.state[param][KEY], before[1])
    train(optimizer, [param], range(1))
    assert not torch.equal(optimizer.state[param][KEY], before[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_unchanged_counts_what_cannot_move(backend: str) -> None:
    """At a learning rate too small for bf16: all native weights, and none in a format that follows."""
    shares = {}
    for weights in WEIGHTS:
        param = nn.Parameter(torch.full((5000,), 0.1, dtype=BF16))
        optimizer = AdamW([param], lr=1e-6, weight_decay=0.0, weights=weights, backend=backend)
        heard: list[StepStats] = []
        optimizer.subscribe(heard.append)
        train(optimizer, [param], range(1))
        shares[weights] = float(heard[0].plans[0].rows[0, 6]) / 5000
    assert shares == {"native": 1.0, "stochastic": 0.0, "split8": 0.0, "split16": 0.0}
