"""What stands around an optimizer in a training script: schedulers, averaging, a compiler, odd tensors, hooks.

Shown with AdamW beside torch's, since nothing of it depends on the rule; where momentum matters, with SGD.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from optwatch import optim
from optwatch.codecs import FORMATS
from tests.optim.training import assert_same, give_gradients, parameters, train

Scheduler = Callable[[torch.optim.Optimizer], Any]


def of(name: str, *given: Any, **options: Any) -> Scheduler:
    """Torch's scheduler of this name."""
    return lambda optimizer: getattr(schedulers, name)(optimizer, *given, **options)


#: Every scheduler of torch.optim.lr_scheduler.
SCHEDULERS: dict[str, Scheduler] = {
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 3), schedulers.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ConstantLR": of("ConstantLR", 0.1, 3),
    "CosineAnnealingLR": of("CosineAnnealingLR", 5),
    "CosineAnnealingWarmRestarts": of("CosineAnnealingWarmRestarts", 3),
    "CyclicLR": of("CyclicLR", 1e-4, 1e-1, step_size_up=2),
    "ExponentialLR": of("ExponentialLR", 0.8),
    "LambdaLR": of("LambdaLR", lambda epoch: 1 / (1 + epoch)),
    "LinearLR": of("LinearLR", 0.1, total_iters=4),
    "MultiStepLR": of("MultiStepLR", [2, 4], 0.3),
    "MultiplicativeLR": of("MultiplicativeLR", lambda _: 0.7),
    "OneCycleLR": of("OneCycleLR", 0.1, total_steps=8),
    "PolynomialLR": of("PolynomialLR", 6),
    "ReduceLROnPlateau": of("ReduceLROnPlateau", patience=0),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=3),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 3), schedulers.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "StepLR": of("StepLR", 2, 0.3),
}


class TestSchedulers:
    """They write to the groups: rates, betas and momentum."""

    def test_all_of_torchs_are_here(self) -> None:
        """The table has each public class."""
        known = {
            name
            for name, kind in vars(schedulers).items()
            if inspect.isclass(kind) and issubclass(kind, schedulers.LRScheduler) and not name.startswith("_")
        }
        assert known - {"LRScheduler"} <= set(SCHEDULERS)

    @pytest.mark.parametrize("kind", ["AdamW", "SGD"])
    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_every_one(self, name: str, kind: str) -> None:
        """The same weights as torch's optimizer under the same scheduler, also after both were resumed."""
        options = {"momentum": 0.9} if kind == "SGD" else {}
        ended = []
        for module in (optim, torch.optim):
            params = parameters()
            optimizer = getattr(module, kind)(params, lr=1e-2, **options)
            scheduler = SCHEDULERS[name](optimizer)
            for step in range(8):
                if step == 4:
                    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
                    optimizer = getattr(module, kind)(params, lr=1.0, **options)
                    scheduler = SCHEDULERS[name](optimizer)
                    optimizer.load_state_dict(saved[0])
                    scheduler.load_state_dict(saved[1])
                train(optimizer, params, range(step, step + 1))
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            ended.append((params, [group["lr"] for group in optimizer.param_groups]))
        (ours, rates), (theirs, other_rates) = ended
        assert rates == other_rates
        assert_same(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["SWA", "EMA"])
def test_averaged_models(average: Any) -> None:
    """torch.optim.swa_utils beside ours and theirs: the same averages and the same running statistics."""
    data = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    ended = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        # No bias before the normalisation: its gradient is zero but for rounding.
        model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 1))
        optimizer = kind(model.parameters(), lr=1e-2)
        averaged, scheduler = (
            AveragedModel(model, multi_avg_fn=average),
            SWALR(optimizer, 0.05, anneal_epochs=2),
        )
        for batch in data:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            averaged.update_parameters(model)
            scheduler.step()
        update_bn(data, averaged)
        ended.append(averaged.state_dict())
    for name, value in ended[0].items():
        torch.testing.assert_close(value, ended[1][name], rtol=1e-4, atol=1e-6)


def compiled(state: str, compile_step: bool) -> list[Tensor]:
    """The weights after some steps of a training step that is compiled as a whole, or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 1))
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, state=state)

    def train_step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    run = torch.compile(train_step, backend="aot_eager") if compile_step else train_step
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        run(torch.randn(16, 64, generator=torch.Generator().manual_seed(step)))
    torch.compiler.reset()
    return [param.detach() for param in model.parameters()]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at the loss's
@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_a_compiled_training_step(state: str) -> None:
    """torch.compile around forward, backward and step, with a rate that changes: the same bits as without it."""
    for ours, plain in zip(compiled(state, True), compiled(state, False), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


class TestOddTensors:
    """Shapes, devices and memory that are no training data."""

    @pytest.mark.parametrize("state", FORMATS)
    def test_empty_ones(self, state: str) -> None:
        """Nothing to step, nothing to store; beside one that has elements."""
        params = [nn.Parameter(torch.zeros(shape)) for shape in ((0,), (3, 0, 2), (5000,))]
        optimizer = optim.AdamW(params, state=state)
        train(optimizer, params, range(2))
        assert optimizer.state_bytes() == optimizer.expected_state_bytes()
        assert params[2].abs().min() > 0

    def test_meta_ones(self) -> None:
        """A model that is not materialised can be planned with: its step makes the state and its bytes."""
        param = nn.Parameter(torch.zeros(64, 80, device="meta"))
        optimizer = optim.AdamW([("w", param)], state="int8", backend="reference")
        optimizer.step()
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert optimizer.state[param]["exp_avg"].device.type == "meta"
        assert optimizer.state_bytes() == optimizer.expected_state_bytes()

    def test_a_gradient_in_another_memory_order(self) -> None:
        """Strides of gradient and parameter need not agree."""
        ours, theirs = parameters(), parameters()
        for params, kind in ((ours, optim.AdamW), (theirs, torch.optim.AdamW)):
            optimizer = kind(params, lr=1e-2)
            for step in range(3):
                give_gradients(params, step)
                for param in params:
                    if param.dim() == 4:
                        param.grad = param.grad.contiguous()
                    elif param.dim() == 2:
                        param.grad = param.grad.t().contiguous().t()
                optimizer.step()
        assert_same(ours, theirs, rtol=1e-5, atol=1e-6)

    def test_a_complex_gradient_is_no_parameter_of_ours(self) -> None:
        """Complex parameters are refused by name at construction, in every group."""
        with pytest.raises(ValueError, match=r"parameter 'z' has dtype torch\.complex128; supported are"):
            optim.SGD([("z", nn.Parameter(torch.zeros(3, dtype=torch.complex128)))])


class TestHooks:
    """torch's hooks, and what they may change."""

    def test_a_pre_hook_may_change_the_arguments_and_the_gradients(self) -> None:
        """As clipping in a hook does."""
        ours, theirs = parameters(), parameters()
        for params, kind in ((ours, optim.AdamW), (theirs, torch.optim.AdamW)):
            optimizer = kind(params, lr=1e-2)
            clip = functools.partial(torch.nn.utils.clip_grad_norm_, params, 0.1)
            optimizer.register_step_pre_hook(lambda *_, clip=clip: clip() and None)
            train(optimizer, params, range(3))
        assert_same(ours, theirs, rtol=1e-5, atol=1e-6)

    def test_state_dict_hooks_may_change_it(self) -> None:
        """A post hook's result is what is saved, a pre hook's what is loaded."""
        param = nn.Parameter(torch.ones(3))
        optimizer = optim.AdamW([param])
        train(optimizer, [param], range(1))
        optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 1})
        saved = optimizer.state_dict()
        assert saved["more"] == 1
        optimizer.register_load_state_dict_pre_hook(
            lambda _, found: {**found, "param_groups": [{**found["param_groups"][0], "lr": 0.5}]}
        )
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.5

    def test_global_hooks(self) -> None:
        """Those of every optimizer run, too."""
        called = []
        handles = [
            register_optimizer_step_pre_hook(lambda *_: called.append("before")),
            register_optimizer_step_post_hook(lambda *_: called.append("after")),
        ]
        try:
            optim.AdamW([nn.Parameter(torch.ones(3))]).step()
        finally:
            for handle in handles:
                handle.remove()
        assert called == ["before", "after"]


def test_zero_grad_and_set_to_none() -> None:
    """Both ways."""
    param = nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW([param])
    param.grad = torch.ones(3)
    optimizer.zero_grad(set_to_none=False)
    assert param.grad.eq(0).all()
    optimizer.zero_grad()
    assert param.grad is None


def test_named_parameters_and_their_groups() -> None:
    """Names are kept in groups and checkpoints, as torch keeps them."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    ours, theirs = (kind(model.named_parameters()) for kind in (optim.AdamW, torch.optim.AdamW))
    assert ours.param_groups[0]["param_names"] == theirs.param_groups[0]["param_names"]
    assert ours.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
