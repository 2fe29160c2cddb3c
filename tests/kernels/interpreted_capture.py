"""Steps that are captured and replayed, in Triton's interpreter; see ``interpreted.py`` and ``replay.py``."""

from __future__ import annotations

import copy
import math
import os
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import optim_db

from optwatch import optim
from tests.kernels.replay import Graph, capturing

assert os.environ["TRITON_INTERPRET"] == "1"

Kind = type[optim.Optimizer]
SIZES = (300, 20, 7)


class Case(NamedTuple):
    kind: Kind
    options: dict[str, Any]
    weights: str = "native"

    def __str__(self) -> str:
        return "-".join([self.kind.__name__, *map(str, self.options.values()), self.weights])


MIXED = {"default": "int8", "exp_avg_sq": "bf16"}  # bf16 is rounded stochastically, also in small tensors
OFTEN = [
    Case(optim.AdamW, {"state": MIXED, "max_grad_norm": 5.0, "nonfinite": "skip"}),
    Case(optim.LAMB, {"state": "bf16", "nonfinite": "zero"}),
    Case(optim.SGD, {"state": "int4", "momentum": 0.9}, "split8"),
]
OTHERS = [
    Case(optim.AdamW, {"state": "fp32"}),
    Case(optim.AdamW, {"state": "int8"}, "stochastic"),
    Case(optim.Adam, {"state": "bf16", "amsgrad": True, "max_grad_norm": 1.0}),
    Case(optim.RMSprop, {"state": "int8", "centered": True, "nonfinite": "skip"}),
    Case(optim.Lion, {"state": "int4", "max_grad_norm": 2.0}, "split16"),
    Case(optim.Adagrad, {"state": "bf16", "lr_decay": 0.1}),
    Case(optim.Adadelta, {"state": "fp32"}),
    Case(optim.AdEMAMix, {"state": "bf16", "alpha_warmup": 5, "beta3_warmup": 5}),
    Case(optim.SophiaG, {"state": "bf16"}),
]
CASES = [pytest.param(c, id=str(c)) for c in OFTEN] + [
    pytest.param(c, id=str(c), marks=pytest.mark.slow) for c in OTHERS
]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    gen = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=gen).to(dtype)) for n in SIZES]


def gradients(step: int, dtype: torch.dtype, poison: bool = False) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(100 + step)
    made = [torch.randn(n, generator=gen).to(dtype) for n in SIZES]
    if poison:
        made[0][5] = math.nan
    return made


class Pair:
    """An optimizer that is captured, and one that takes each step; both hear of the same gradients."""

    def __init__(self, case: Case) -> None:
        self.dtype = torch.float32 if case.weights == "native" else torch.bfloat16
        self.params, self.others = parameters(self.dtype), parameters(self.dtype)
        self.lr = torch.tensor(1e-2)
        options = {**case.options, "weights": case.weights, "backend": "triton"}
        self.ours = case.kind(self.params, lr=self.lr, capturable=True, **options)  # type: ignore[call-arg]
        self.plain = case.kind(self.others, lr=torch.tensor(1e-2), **options)  # type: ignore[call-arg]
        self.stats: list[optim.StepStats] = []
        self.expected: list[optim.StepStats] = []
        self.ours.subscribe(self.stats.append)
        self.plain.subscribe(self.expected.append)

    def rate(self, lr: float) -> None:
        self.lr.fill_(lr)
        self.plain.param_groups[0]["lr"].fill_(lr)

    def plain_step(self, grads: list[torch.Tensor | None]) -> None:
        for param, grad in zip(self.others, grads, strict=True):
            param.grad = None if grad is None else grad.clone()
        self.plain.step()

    def step(self, grads: list[torch.Tensor | None]) -> None:
        """An ordinary step of both, ours with gradients in other memory."""
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = None if grad is None else grad.clone()
        self.ours.step()
        self.plain_step(grads)

    def memory(self) -> list[torch.Tensor]:
        state = [t for values in self.ours.state.values() for t in values.values()]
        return [*(p.detach() for p in self.params), *state]

    def capture(self, monkeypatch: pytest.MonkeyPatch, missing: int | None = None) -> None:
        """Capture a step, with gradients in new memory."""
        self.grads = gradients(0, self.dtype)
        for i, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            param.grad = None if i == missing else grad
        before = [t.clone() for t in self.memory()]
        with capturing(monkeypatch) as made:
            self.ours.step()
        for tensor, value in zip(self.memory(), before, strict=True):
            assert_equal(tensor, value)
        for param in self.params:
            param.grad = None
        self.missing = missing
        self.graph: Graph = made()
        self.rows = self.stats[-1]

    def replay(self, grads: list[torch.Tensor]) -> None:
        for mine, grad in zip(self.grads, grads, strict=True):
            mine.copy_(grad)
        self.graph.replay()
        self.plain_step([None if i == self.missing else grad for i, grad in enumerate(grads)])

    def check(self) -> None:
        """Weights, state and counts, bit by bit."""
        self.plain.state_dict()  # its host counts a step before it hears that it was skipped
        for mine, other in zip(self.params, self.others, strict=True):
            assert_equal(mine.detach(), other.detach())
            ours, plain = self.ours.state[mine], self.plain.state[other]
            assert ours.keys() == plain.keys()
            for key, value in plain.items():
                assert_equal(ours[key], value)

    def check_rows(self) -> None:
        """The statistics, where the graph fills them."""
        expected = self.expected[-1]
        for mine, other in zip(self.rows.plans, expected.plans, strict=True):
            assert_equal(mine.rows, other.rows)
        assert (self.rows.decision is None) == (expected.decision is None)
        if expected.decision is not None:
            assert_equal(self.rows.decision, expected.decision)


def assert_equal(mine: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
def test_replays_are_steps(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, weights, state, counts and statistics, with other rates and gradients, between ordinary steps."""
    pair = Pair(case)
    bad = {4, 6} if case.options.get("nonfinite") else set()
    for step in range(2):
        pair.step(gradients(step, pair.dtype))
    pair.capture(monkeypatch)
    assert pair.rows.captured is not None
    assert pair.rows.full
    pair.check()
    for step in range(2, 8):
        pair.rate(1e-2 / step)
        if step == 5:
            pair.step([*gradients(step, pair.dtype)[:2], None])
            continue
        pair.replay(gradients(step, pair.dtype, step in bad))
        pair.check()
        pair.check_rows()
    found = pair.ours.state_dict()["state"], pair.plain.state_dict()["state"]
    assert {i: float(s["step"]) for i, s in found[0].items()} == {
        i: float(s["step"]) for i, s in found[1].items()
    }


def test_a_loss_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scale and its verdict are read where they lie; a tensor without a gradient is left alone."""
    pair = Pair(OFTEN[0])
    pair.ours.grad_scale = pair.plain.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
    pair.ours.found_inf = pair.plain.found_inf = torch.tensor([0.0])  # type: ignore[attr-defined]
    pair.step(gradients(0, pair.dtype))
    pair.capture(monkeypatch, missing=1)
    for step in range(1, 5):
        pair.ours.found_inf.fill_(step == 2)  # type: ignore[attr-defined]
        pair.replay(gradients(step, pair.dtype))
        pair.check()
    assert [float(pair.ours.state[p]["step"]) for p in pair.params] == [4.0, 1.0, 4.0]


def test_several_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are constants of the capture, tensors are read, each of its own group."""
    pair = Pair(Case(optim.AdamW, {"state": "fp32"}))
    for optimizer in (pair.ours, pair.plain):
        last = optimizer.param_groups[0]["params"].pop()
        optimizer.add_param_group(
            {"params": [last], "lr": 3e-3, "betas": (0.5, 0.9), "capturable": optimizer is pair.ours}
        )
    pair.step(gradients(0, pair.dtype))
    pair.capture(monkeypatch)
    pair.ours.param_groups[1]["lr"] = 1.0  # not heard of by the graph
    for step in range(1, 4):
        pair.rate(1e-3 * step)
        pair.replay(gradients(step, pair.dtype))
        pair.check()
    pair.plain.param_groups[1]["lr"] = 1.0
    pair.step(gradients(4, pair.dtype))
    pair.check()


def test_a_hessian_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step aside is captured as well, and counts as none."""
    pair = Pair(OTHERS[-1])
    pair.step(gradients(0, pair.dtype))
    for optimizer in (pair.ours, pair.plain):
        optimizer.update_hessian()  # type: ignore[attr-defined]
    monkeypatch.setattr(pair.ours, "step", pair.ours.update_hessian)  # type: ignore[attr-defined]
    monkeypatch.setattr(pair.plain, "step", pair.plain.update_hessian)  # type: ignore[attr-defined]
    pair.capture(monkeypatch)
    for step in range(1, 3):
        pair.replay(gradients(step, pair.dtype))
        pair.check()


def test_what_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with what to do about it."""

    def refused(optimizer: optim.Optimizer, words: str, steps: int = 1) -> None:
        params = optimizer.param_groups[0]["params"]
        for param, grad in zip(params, gradients(0, torch.float32), strict=True):
            param.grad = grad
        for _ in range(steps):
            optimizer.step()
        with pytest.raises(RuntimeError, match=words), capturing(monkeypatch):
            optimizer.step()

    refused(optim.AdamW(parameters(), capturable=True, backend="triton"), "take a step like it before", 0)
    refused(optim.AdamW(parameters(), backend="triton"), "with capturable=True")
    refused(optim.AdamW(parameters(), capturable=True, backend="triton", nonfinite="raise"), "cannot raise")
    changed = optim.AdamW(parameters(), capturable=True, backend="triton")
    refused(changed, "take a step like it before", 0)
    changed.step()
    changed.max_grad_norm = 1.0
    refused(changed, "take a step like it before", 0)
    with pytest.raises(RuntimeError, match="exclude each other"):
        optim.AdamW(parameters(), capturable=True, backend="triton").release_gradients()


def test_a_graph_that_reads_the_host_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof fails where a graph would: a number read on the host, and memory that is gone."""
    there = torch.zeros(3)
    with pytest.raises(AssertionError, match="wait for the device"), capturing(monkeypatch):
        there[0].item()
    with capturing(monkeypatch) as made:
        there.add_(torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(AssertionError, match="nobody keeps"):
        made()


def test_too_many_captures_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step between them makes room again."""
    pair = Pair(OFTEN[0])
    pair.step(gradients(0, pair.dtype))
    for _ in range(4):
        pair.capture(monkeypatch)
    with pytest.raises(RuntimeError, match="more than 4 graphs were captured in a row"):
        pair.capture(monkeypatch)
    pair.step(gradients(1, pair.dtype))
    pair.capture(monkeypatch)
    pair.replay(gradients(2, pair.dtype))
    pair.check()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(
            info.optim_cls.__name__,
            given.kwargs,
            id=f"{info.optim_cls.__name__}-{given.desc}",
            marks=[] if info.optim_cls is torch.optim.AdamW else [pytest.mark.slow],
        )
        for info in optim_db
        if hasattr(optim, info.optim_cls.__name__)
        for given in info.optim_inputs_func(device="cuda")
        if given.kwargs.get("capturable")
    ],
)
def test_torchs_capturable_inputs(name: str, options: dict[str, Any]) -> None:
    """Numbers from the device and from the host give the same bits."""
    results = []
    for capturable in (True, False):
        params = parameters()
        given = copy.deepcopy(options) | {"capturable": capturable, "backend": "triton"}
        optimizer = getattr(optim, name)(params, **given)
        for step in range(2):
            for param, grad in zip(params, gradients(step, torch.float32), strict=True):
                param.grad = grad
            optimizer.step()
        results.append([p.detach() for p in params])
    for mine, other in zip(*results, strict=True):
        assert_equal(mine, other)


def test_copies_and_checkpoints() -> None:
    """The count lies where the parameter does, goes along, and may be switched to the host's and back."""
    pair = Pair(OFTEN[0])
    for step in range(3):
        pair.step(gradients(step, pair.dtype))
    assert pair.ours.state_bytes() == pair.ours.expected_state_bytes()
    for again in (copy.deepcopy(pair.ours), pickle.loads(pickle.dumps(pair.ours))):
        params = again.param_groups[0]["params"]
        assert [float(again.state[p]["step"]) for p in params] == [3.0] * 3
    saved = pair.plain.state_dict()
    pair.ours.load_state_dict(saved)  # torch's way: the option is the checkpoint's
    assert pair.ours.param_groups[0]["capturable"] is False
    pair.step(gradients(3, pair.dtype))
    pair.ours.param_groups[0]["capturable"] = True
    pair.step(gradients(4, pair.dtype))
    pair.check()


def test_taking_over_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capturable optimizer's successor is one, with the count and the rate's tensor."""
    params = parameters()
    before = torch.optim.AdamW(params, lr=torch.tensor(1e-2), capturable=True)
    before.param_groups[0]["capturable"] = False  # torch captures nothing on a CPU
    for param, grad in zip(params, gradients(0, torch.float32), strict=True):
        param.grad = grad
    before.step()
    before.param_groups[0]["capturable"] = True
    after = optim.replace(before, state="fp32", backend="triton")
    assert after.param_groups[0]["capturable"] is True
    after.step()
    with capturing(monkeypatch) as made:
        after.step()
    assert float(after.state[params[0]]["step"]) == 2.0
    made().replay()
    assert float(after.state[params[0]]["step"]) == 3.0
