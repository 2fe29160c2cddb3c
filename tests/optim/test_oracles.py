"""Every optimizer against an oracle: the torch.optim class, or its formula in float64. A new optimizer adds rows."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from optwatch import optim
from optwatch.codecs import FORMATS
from optwatch.kernels import PlanSpec, backend
from tests.kernels.agreement import formats
from tests.optim.training import BACKENDS, assert_same, give_gradients, parameters, train

State = dict[str, Any]


class Formula(torch.optim.Optimizer):
    """An oracle that works in float64 on weights of its own, and hands them out rounded.

    ``formula(w, g, state, t, options)`` gives the new weight; ``fold`` what :meth:`update_hessian` does to the state.
    """

    def __init__(self, params: list[nn.Parameter], formula: Callable[..., Tensor], **options: Any) -> None:
        super().__init__(params, options)
        self.formula, self.steps = formula, 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        self._run(self.formula)

    @torch.no_grad()
    def update_hessian(self) -> None:
        self._run(fold_sophiag)

    def _run(self, formula: Callable[..., Tensor]) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state.setdefault("w", p.double())
            state["w"] = formula(state["w"], p.grad.double(), state, self.steps, self.param_groups[0])
            p.copy_(state["w"])


def average(state: State, name: str, value: Tensor, beta: float) -> Tensor:
    """The exponential moving average ``name`` with ``value`` added."""
    state[name] = beta * state.get(name, torch.zeros_like(value)) + (1 - beta) * value
    return state[name]


def lion(w: Tensor, g: Tensor, state: State, t: int, o: State) -> Tensor:
    beta1, beta2 = o["betas"]
    g = -g if o.get("maximize") else g
    direction = (beta1 * state.get("m", torch.zeros_like(g)) + (1 - beta1) * g).sign()
    average(state, "m", g, beta2)
    return w * (1 - o["lr"] * o["weight_decay"]) - o["lr"] * direction


def signed_momentum(w: Tensor, g: Tensor, state: State, t: int, o: State) -> Tensor:
    return w - o["lr"] * average(state, "m", g, o["betas"][1]).sign()


def ademamix(w: Tensor, g: Tensor, state: State, t: int, o: State) -> Tensor:
    (beta1, beta2, beta3), alpha = o["betas"], o["alpha"]
    g = -g if o.get("maximize") else g
    if (warmup := o["alpha_warmup"]) and t < warmup:
        alpha *= t / warmup
    if (warmup := o["beta3_warmup"]) and t < warmup:
        start, end = (math.log(0.5) / math.log(beta) for beta in (beta1, beta3))  # half-lives
        beta3 = 0.5 ** (1 / (start + (end - start) * t / warmup))
    m, slow = average(state, "m", g, beta1), average(state, "slow", g, beta3)
    v = average(state, "v", g * g, beta2)
    u = (m / (1 - beta1**t) + alpha * slow) / ((v / (1 - beta2**t)).sqrt() + o["eps"])
    return w - o["lr"] * (u + o["weight_decay"] * w)


def sophiag(w: Tensor, g: Tensor, state: State, t: int, o: State) -> Tensor:
    m = average(state, "m", -g if o.get("maximize") else g, o["betas"][0])
    h = state.get("h", torch.zeros_like(g))
    ratio = (m.abs() / (o["rho"] * o["bs"] * h + 1e-15)).clamp(max=1)
    return w * (1 - o["lr"] * o["weight_decay"]) - o["lr"] * m.sign() * ratio


def fold_sophiag(w: Tensor, g: Tensor, state: State, t: int, o: State) -> Tensor:
    average(state, "h", g * g, o["betas"][1])
    return w


def lamb(w: Tensor, g: Tensor, state: State, t: int, o: State) -> Tensor:
    beta1, beta2 = o["betas"]
    g = -g if o.get("maximize") else g
    m, v = average(state, "m", g, beta1), average(state, "v", g * g, beta2)
    if o.get("bias_correction", True):
        m, v = m / (1 - beta1**t), v / (1 - beta2**t)
    r = m / (v.sqrt() + o["eps"]) + o["weight_decay"] * w
    norms = w.norm(), r.norm()
    adapts = o.get("always_adapt", True) or o["weight_decay"]
    ratio = norms[0] / norms[1] if adapts and all(norms) else torch.ones_like(norms[0])
    return w - o["lr"] * (ratio.clamp(max=1) if o.get("trust_clip") else ratio) * r


class Row(NamedTuple):
    """An optimizer with options, and what it must equal."""

    ours: type[optim.Optimizer]
    oracle: Callable[..., torch.optim.Optimizer]
    options: State
    theirs: State | None = None  # the oracle's options where they are others
    far: float = 0.02  # how far from fp32's the weights may end with low-bit state, over how far they went

    def mine(self, params: list[nn.Parameter], **more: Any) -> optim.Optimizer:
        return self.ours(params, **self.options, **more)

    def other(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return self.oracle(params, **(self.options if self.theirs is None else self.theirs))

    def __str__(self) -> str:
        return "-".join([self.ours.__name__, *(f"{name}={value}" for name, value in self.options.items())])


#: Our class and torch's, and every option that matters, in combinations.
TORCH: list[Row] = [
    Row(getattr(optim, name), getattr(torch.optim, name), options)
    for name, options in [
        ("AdamW", {}),
        ("AdamW", {"lr": 1e-2, "weight_decay": 0.3}),
        ("AdamW", {"betas": (0.5, 0.9), "eps": 1e-4}),
        ("AdamW", {"maximize": True}),
        ("AdamW", {"betas": (0.0, 0.0)}),
        ("AdamW", {"lr": 1e-2, "betas": (0.8, 0.6), "amsgrad": True}),
        ("Adam", {"lr": 1e-2}),
        ("Adam", {"weight_decay": 0.3, "maximize": True}),
        ("Adam", {"weight_decay": 0.3, "betas": (0.8, 0.6), "amsgrad": True}),
        ("Adam", {"weight_decay": 0.3, "decoupled_weight_decay": True}),
        ("SGD", {}),
        ("SGD", {"lr": 0.1, "weight_decay": 0.3, "maximize": True}),
        ("SGD", {"lr": 0.1, "momentum": 0.9}),
        ("SGD", {"momentum": 0.8, "dampening": 0.5, "weight_decay": 0.3, "maximize": True}),
        ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.3}),
        ("RMSprop", {}),
        ("RMSprop", {"alpha": 0.8, "weight_decay": 0.3, "maximize": True}),
        ("RMSprop", {"momentum": 0.9, "weight_decay": 0.3}),
        ("RMSprop", {"centered": True, "weight_decay": 0.3}),
        ("RMSprop", {"centered": True, "momentum": 0.5, "alpha": 0.9, "eps": 1e-4}),
        ("Adagrad", {}),
        ("Adagrad", {"lr_decay": 0.1, "weight_decay": 0.3, "maximize": True}),
        ("Adagrad", {"initial_accumulator_value": 0.3}),
        ("Adadelta", {}),
        ("Adadelta", {"rho": 0.5, "eps": 1e-3, "weight_decay": 0.3, "maximize": True}),
    ]
]
_LION = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.3}
_MIX = {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "eps": 1e-8, "weight_decay": 0.1}
_SOPHIA = {"lr": 1e-3, "betas": (0.965, 0.99), "rho": 0.04, "weight_decay": 0.1, "bs": 100}
_ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
FORMULAS = [
    Row(optim.Lion, partial(Formula, formula=lion), _LION, far=0.2),  # a sign is right or wrong
    Row(optim.Lion, partial(Formula, formula=lion), {**_LION, "maximize": True}, far=0.2),
    Row(
        optim.Lion,
        partial(Formula, formula=signed_momentum),
        {**_LION, "betas": (0.9, 0.9), "weight_decay": 0.0},
        far=0.2,
    ),
    Row(
        optim.AdEMAMix,
        partial(Formula, formula=ademamix),
        {**_MIX, "alpha_warmup": None, "beta3_warmup": None, "maximize": True},
    ),
    Row(
        optim.AdEMAMix,
        partial(Formula, formula=ademamix),
        {**_MIX, "alpha_warmup": 10, "beta3_warmup": 15},
    ),
    Row(optim.AdEMAMix, torch.optim.AdamW, {**_MIX, "alpha": 0.0}, theirs=_ADAM),
    Row(optim.SophiaG, partial(Formula, formula=sophiag), _SOPHIA),
    Row(optim.SophiaG, partial(Formula, formula=sophiag), {**_SOPHIA, "maximize": True}),
]
_LAMB = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
FORMULAS += [
    Row(optim.LAMB, partial(Formula, formula=lamb), {**_LAMB, **options})
    for options in (
        {},
        {"maximize": True, "bias_correction": False},
        {"trust_clip": True, "lr": 1e-3},
        {"always_adapt": False, "weight_decay": 0.0, "lr": 1e-3},
    )
]
ROWS = TORCH + FORMULAS


def backends_of(row: Row) -> list[str]:
    """Those that have a kernel for the row's rule; an error about anything else is for the test to find."""
    optimizer = row.mine([nn.Parameter(torch.ones(1))])
    rule = optimizer.rule_for(optimizer.param_groups[0])
    spec = PlanSpec(
        rule, tuple(FORMATS["fp32"][slot.kind] for slot in rule.slots), torch.float32, torch.float32
    )
    reasons = {name: backend(name).why_not(spec, torch.device("cpu")) for name in BACKENDS}
    return [name for name, reason in reasons.items() if reason is None or f"rule {rule.name!r}" not in reason]


ON_BACKENDS = [pytest.param(row, name, id=f"{row}-{name}") for row in ROWS for name in backends_of(row)]


def fold(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], seed: int) -> None:
    """Give the optimizer a Hessian if it wants one."""
    if hasattr(optimizer, "update_hessian"):
        give_gradients(params, 10_000 + seed)
        optimizer.update_hessian()


def train_folding(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        if step % 4 == 2:
            fold(optimizer, params, step)
        train(optimizer, params, range(step, step + 1))


@pytest.mark.parametrize(("row", "name"), ON_BACKENDS)
def test_fp32_state_equals_the_oracle(row: Row, name: str) -> None:
    """Twenty steps on every memory layout."""
    ours, theirs = parameters(), parameters()
    train_folding(row.mine(ours, backend=name), ours, range(20))
    train_folding(row.other(theirs), theirs, range(20))
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("row", "name"), ON_BACKENDS)
def test_bf16_parameters_take_the_exact_step(row: Row, name: str) -> None:
    """Each step is the fp32 one, rounded once."""
    ours = parameters(torch.bfloat16)
    optimizer = row.mine(ours, backend=name)
    for step in range(5):
        if step:
            fold(optimizer, ours, step)
        exact = [nn.Parameter(p.detach().float()) for p in ours]
        oracle = row.mine(exact, backend="reference")
        for p, q in zip(ours, exact, strict=True):
            if step:
                oracle.state[q] = {"step": torch.tensor(float(step)), **optimizer.dequantized_state(p)}
        give_gradients(ours, step)
        for p, q in zip(ours, exact, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        oracle.step()
        assert_same(ours, [q.to(torch.bfloat16) for q in exact], rtol=2**-7, atol=1e-6)


#: How much further than a row says the coarser formats may end.
COARSER = {"int8_dynamic": 1.5, "fp8": 3, "int4": 10}


@pytest.mark.parametrize(
    ("row", "name", "state"),
    [
        pytest.param(row, name, state, id=f"{row}-{name}-{state}")
        for row in ROWS
        for name in backends_of(row)
        for state in formats(name)
        if state != "fp32"
    ],
)
def test_low_bit_state_follows(row: Row, name: str, state: str) -> None:
    """Twenty steps lead almost where exact state leads, and the state takes the bytes that were asked for."""
    low, exact, start = parameters(), parameters(), parameters()
    optimizer = row.mine(low, state=state, backend=name)
    train_folding(optimizer, low, range(20))
    train_folding(row.mine(exact, backend="reference"), exact, range(20))
    off = sum((a - b).square().sum() for a, b in zip(low, exact, strict=True))
    way = sum((a - b).square().sum() for a, b in zip(start, exact, strict=True))
    assert off <= min(row.far * COARSER.get(state, 1), 0.2) ** 2 * way
    assert optimizer.state_bytes() == optimizer.expected_state_bytes()


@pytest.mark.parametrize(("row", "name"), ON_BACKENDS)
def test_a_checkpoint_continues_bit_by_bit(row: Row, name: str) -> None:
    """Low-bit state is saved and loaded as it is."""
    params, others = parameters(), parameters()
    first, second = (row.mine(p, state="int8", backend=name) for p in (params, others))
    train_folding(first, params, range(5))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    train_folding(first, params, range(5, 10))
    train_folding(second, others, range(5, 10))
    assert_same(params, others, rtol=0, atol=0)


@pytest.mark.parametrize("row", TORCH, ids=str)
def test_loads_and_gives_torch_checkpoints(row: Row) -> None:
    """With fp32 state a checkpoint moves between the two, both ways."""
    ours, theirs = parameters(), parameters()
    oracle = row.other(theirs)
    train(oracle, theirs, range(5))
    optimizer = row.mine(ours, backend="reference")
    optimizer.load_state_dict(oracle.state_dict())
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q.data)
    train(optimizer, ours, range(5, 8))
    train(oracle, theirs, range(5, 8))
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)
    oracle.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch takes tensors over as they are
    train(oracle, theirs, range(8, 10))
    train(optimizer, ours, range(8, 10))
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted({row.ours.__name__ for row in TORCH}))
def test_the_constructor_is_torchs(name: str) -> None:
    """Same names, order and defaults; our own come last and by keyword."""
    ours = list(inspect.signature(getattr(optim, name)).parameters.values())
    theirs = list(inspect.signature(getattr(torch.optim, name)).parameters.values())
    for mine, other in zip(ours, theirs, strict=False):
        assert (mine.name, mine.default, mine.kind) == (other.name, other.default, other.kind)
    own = ["state", "weights", "seed", "backend", "max_grad_norm", "nonfinite"]
    own += ["capturable"] * ("capturable" not in {p.name for p in theirs})
    assert [p.name for p in ours[len(theirs) :]] == own


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (optim.Adam, {"betas": (0.9,)}, r"betas=\(0.9,\) is out of range: expected two numbers of \[0, 1\)"),
        (
            optim.Adam,
            {"differentiable": True},
            "differentiable=True is not supported by optwatch.optim.Adam; leave",
        ),
        (optim.SGD, {"momentum": -1}, "momentum=-1 is out of range: expected a number of at least 0"),
        (optim.SGD, {"nesterov": True}, "nesterov=True with momentum=0 and dampening=0: expected a momentum"),
        (optim.RMSprop, {"alpha": 1.5}, r"alpha=1.5 is out of range: expected a number of \[0, 1\]"),
        (optim.Adagrad, {"initial_accumulator_value": -1}, "initial_accumulator_value=-1 is out of range"),
        (optim.Adadelta, {"rho": 2}, r"rho=2 is out of range: expected a number of \[0, 1\]"),
        (optim.Lion, {"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) is out of range"),
        (optim.AdEMAMix, {"betas": (0.9, 0.999)}, "betas=.* is out of range: expected three numbers"),
        (optim.AdEMAMix, {"alpha_warmup": -3}, "alpha_warmup=-3 is out of range: expected a number of steps"),
        (optim.LAMB, {"eps": -1e-6}, "eps=-1e-06 is out of range: expected a number of at least 0"),
        (optim.SophiaG, {"bs": 0}, "bs=0 is out of range: expected a number greater than 0"),
    ],
    ids=str,
)
def test_options_out_of_range(kind: type[optim.Optimizer], options: State, message: str) -> None:
    """Refused at construction, by name."""
    with pytest.raises(ValueError, match=message):
        kind([nn.Parameter(torch.ones(3))], **options)


@pytest.mark.parametrize(
    ("kind", "option"),
    [(optim.Lion, "amsgrad"), (optim.SGD, "amsgrad"), (optim.Adagrad, "momentum"), (optim.LAMB, "centered")],
)
def test_an_option_that_the_rule_has_not(kind: type[optim.Optimizer], option: str) -> None:
    """Neither the constructor nor a group takes it and goes on without."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        kind(params, **{option: True})
    optimizer = kind(params[:1])
    with pytest.raises(ValueError, match=rf"{option}=True: optwatch\.optim\.{kind.__name__} has no {option}"):
        optimizer.add_param_group({"params": params[1:], option: True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("kind", "change", "slot"),
    [
        (optim.SGD, {"momentum": 0.9}, "momentum_buffer"),
        (optim.AdamW, {"amsgrad": True}, "max_exp_avg_sq"),
        (optim.RMSprop, {"centered": True}, "grad_avg"),
    ],
    ids=str,
)
def test_a_slot_that_an_option_asks_for_later(kind: type[optim.Optimizer], change: State, slot: str) -> None:
    """A run that goes on with another rule needs its state: never a step that ignores the option."""
    param = nn.Parameter(torch.ones(5))
    optimizer = kind([("w", param)], backend="reference")
    train(optimizer, [param], range(2))
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match=f"state of parameter 'w' does not fit: slot '{slot}' should be"):
        train(optimizer, [param], range(1))


def test_a_constant_gradient_has_no_negative_variance() -> None:
    """Centered RMSprop takes a root of s - m*m, which rounding would take below zero."""
    for state in FORMATS:
        param = nn.Parameter(torch.zeros(5000))
        optimizer = optim.RMSprop([param], centered=True, alpha=0.5, state=state, backend="reference")
        for _ in range(100):
            param.grad = torch.linspace(0.1, 10, 5000)
            optimizer.step()
        assert param.isfinite().all()
