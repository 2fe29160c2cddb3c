"""What users of torch.optim rely on, and what an optimizer tells and refuses; shown with AdamW, it holds for all."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optwatch.codecs import FORMATS
from optwatch.optim import AdamW, StateKind, StepStats
from tests.optim.training import FORMATS_ON_BACKENDS, assert_same, give_gradients, parameters, train


@pytest.mark.parametrize(("state", "backend"), FORMATS_ON_BACKENDS)
def test_state_dict_round_trip_continues_bit_by_bit(state: str, backend: str, tmp_path: Any) -> None:
    """Through torch.save and weights_only: the run that was saved and the one that was not are the same."""
    params, others = parameters(), parameters(seed=7)
    first = AdamW(params, lr=1e-2, state=state, seed=5, backend=backend)
    train(first, params, range(7))
    torch.save(
        {"optimizer": first.state_dict(), "weights": [p.detach() for p in params]}, tmp_path / "checkpoint"
    )
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    second = AdamW(others, lr=5.0, state=state, backend=backend)
    second.load_state_dict(saved["optimizer"])
    for other, weight in zip(others, saved["weights"], strict=True):
        other.data.copy_(weight)
    assert second.state_bytes() == first.state_bytes()
    train(first, params, range(7, 14))
    train(second, others, range(7, 14))
    assert_same(params, others, rtol=0, atol=0)
    assert second.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_continue_bit_by_bit(copied: Callable[[Any], Any]) -> None:
    """A copy has state of its own and the same future."""
    params = parameters()
    optimizer = AdamW(params, state="int8")
    train(optimizer, params, range(3))
    clone = copied(optimizer)
    cloned = [p for group in clone.param_groups for p in group["params"]]
    train(optimizer, params, range(3, 6))
    train(clone, cloned, range(3, 6))
    assert_same(params, cloned, rtol=0, atol=0)


def test_another_format_is_refused_or_converted() -> None:
    """Never cast: the message names both formats and the parameter, and a refusal changes nothing."""
    params = {"layer.weight": nn.Parameter(torch.randn(64, 128)), "layer.bias": nn.Parameter(torch.randn(64))}
    source = AdamW(params.items(), state="fp32")
    train(source, list(params.values()), range(5))
    target = AdamW(params.items(), state="int8")
    with pytest.raises(
        ValueError, match=r"'exp_avg' of parameter 'layer\.weight' as fp32, state='int8' asks for int8_cubic"
    ):
        target.load_state_dict(source.state_dict())
    assert not target.state
    target.load_state_dict(source.state_dict(), convert=True)
    assert target.state_bytes() == target.expected_state_bytes()
    for name, exact in source.dequantized_state(params["layer.weight"]).items():
        ours = target.dequantized_state(params["layer.weight"])[name]
        assert (ours - exact).norm() < 0.05 * exact.norm()
    back = AdamW(params.items(), state="fp32")
    back.load_state_dict(target.state_dict(), convert=True)
    assert back.state_bytes() == back.expected_state_bytes()


def _damage_missing(state: dict[str, Any]) -> None:
    del state["state"][0]["exp_avg_sq"]


def _damage_shape(state: dict[str, Any]) -> None:
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][:-1]


def _damage_scale(state: dict[str, Any]) -> None:
    state["state"][0]["exp_avg_scale"] = state["state"][0]["exp_avg_scale"][:-1]


def _damage_step(state: dict[str, Any]) -> None:
    del state["state"][0]["step"]


def _damage_dtype(state: dict[str, Any]) -> None:
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].double()


def _damage_schema(state: dict[str, Any]) -> None:
    state["param_groups"][0]["schema"] = 99


def _damage_extra(state: dict[str, Any]) -> None:
    state["state"][17] = state["state"][0]


def _damage_groups(state: dict[str, Any]) -> None:
    state["param_groups"][0]["params"].append(1)


def _damage_renamed(state: dict[str, Any]) -> None:
    state["state"][0]["m"] = state["state"][0].pop("exp_avg")


def _damage_codes_lost(state: dict[str, Any]) -> None:
    state["state"][0]["exp_avg_sq"] = None


def _damage_grid_lost(state: dict[str, Any]) -> None:
    del state["state"][0]["exp_avg_sq_grid"]


def _damage_state_list(state: dict[str, Any]) -> None:
    state["state"] = [state["state"][0]]


def _damage_state_flat(state: dict[str, Any]) -> None:
    state["state"] = state["state"][0]


def _damage_no_groups(state: dict[str, Any]) -> None:
    del state["param_groups"]


def _damage_no_params(state: dict[str, Any]) -> None:
    del state["param_groups"][0]["params"]


def _damage_name(state: dict[str, Any]) -> None:
    state["param_groups"][0]["params"] = [0, 1]
    state["param_groups"][0]["param_names"] = ["w", "head.bias"]


def _damage_option(state: dict[str, Any]) -> None:
    state["param_groups"][0]["lr"] = -1.0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _damage_renamed,
            r"parameter 'w' does not fit: slot 'exp_avg' should be a tensor of shape \(64, 80\), found no",
        ),
        (
            _damage_codes_lost,
            "parameter 'w' does not fit: slot 'exp_avg_sq' should be a tensor .* found nothing",
        ),
        (
            _damage_grid_lost,
            "parameter 'w' does not fit: slot 'exp_avg_sq' has dtype torch.uint8 with no auxiliary",
        ),
        (_damage_state_list, "not an optimizer's state dict: 'state' is not a dict of dicts"),
        (_damage_state_flat, "not an optimizer's state dict: 'state' is not a dict of dicts"),
        (_damage_no_groups, "not an optimizer's state dict: 'param_groups' is missing"),
        (_damage_no_params, "not an optimizer's state dict: group 0 has no list 'params'"),
        (
            _damage_name,
            r"groups of \[2\] parameters, the optimizer of \[1\]; it lacks \[\], and has besides \['head.bias'\]",
        ),
        (_damage_option, "lr=-1.0 is out of range"),
        (_damage_missing, "parameter 'w' does not fit: slot 'exp_avg_sq' should be a tensor"),
        (
            _damage_shape,
            r"parameter 'w' does not fit: slot 'exp_avg' has shape \(63, 80\), the parameter \(64, 80\)",
        ),
        (_damage_scale, "parameter 'w' does not fit: 'exp_avg_scale' has 39 values, expected 40"),
        (_damage_step, "state of parameter 'w' has no 'step'"),
        (_damage_dtype, "parameter 'w' does not fit: slot 'exp_avg' has dtype torch.float64"),
        (_damage_schema, "the checkpoint has schema 99; this version of optwatch reads 1"),
        (_damage_extra, "state for unknown parameters"),
        (_damage_groups, r"parameter groups of \[2\] parameters, the optimizer of \[1\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_checkpoint_is_refused_by_name(
    damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    """What was found and what was expected; the optimizer stays as it was and trains on."""
    param = nn.Parameter(torch.randn(64, 80))
    optimizer = AdamW([("w", param)], state="int8")
    train(optimizer, [param], range(3))
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict())
    damage(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, value in before["state"][0].items():
        assert torch.equal(after["state"][0][key], value)


class TestBytes:
    """Bytes are counted, and expected bytes come from what was asked for."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("state", FORMATS)
    def test_actual_equals_expected_and_the_sum_of_storages(self, state: str, dtype: torch.dtype) -> None:
        """To the byte, in every format and layout."""
        params = parameters(dtype)
        optimizer = AdamW(params, state=state, backend="reference")
        train(optimizer, params, range(2))
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for states in optimizer.state.values()
            for tensor in states.values()
        }
        assert sum(optimizer.state_bytes().values()) == sum(storages.values())
        assert optimizer.state_bytes() == optimizer.expected_state_bytes()

    def test_promoted_state_is_found_at_the_next_step(self) -> None:
        """Placing fp32 tensors in optimizer.state is what a stock loader does to low-bit state."""
        param = nn.Parameter(torch.randn(100, 100))
        optimizer = AdamW([param], lr=1e-2, state="int8")
        train(optimizer, [param], range(3))
        twin = nn.Parameter(param.detach().clone())
        oracle = torch.optim.AdamW([twin], lr=1e-2)
        exact = optimizer.dequantized_state(param)
        oracle.state[twin] = {"step": torch.tensor(3.0), **{k: v.clone() for k, v in exact.items()}}
        optimizer.state[param].update(exact)
        for key in ("exp_avg_scale", "exp_avg_sq_grid"):
            del optimizer.state[param][key]
        train(optimizer, [param], range(3, 6))
        train(oracle, [twin], range(3, 6))
        assert_same([param], [twin], rtol=1e-5, atol=1e-6)
        assert optimizer.state_bytes()[StateKind("exp_avg", "float32", "cpu")] == 40_000
        assert StateKind("exp_avg", "int8", "cpu") in optimizer.expected_state_bytes()

    def test_groups_may_differ(self) -> None:
        """state= is an option of the parameter group."""
        params = [nn.Parameter(torch.randn(5000)) for _ in range(2)]
        optimizer = AdamW([{"params": params[:1]}, {"params": params[1:], "state": "bf16"}], state="int8")
        train(optimizer, params, range(2))
        assert optimizer.state[params[0]]["exp_avg"].dtype == torch.int8
        assert optimizer.state[params[1]]["exp_avg"].dtype == torch.bfloat16
        assert optimizer.state_bytes() == optimizer.expected_state_bytes()


class TestDropIn:
    """What users of torch.optim rely on."""

    def test_late_frozen_and_thawed_parameters(self) -> None:
        """A parameter counts its own steps, from its first gradient on."""
        ours, theirs = parameters(), parameters()
        mine, oracle = AdamW(ours[:-1]), torch.optim.AdamW(theirs[:-1])
        for step in range(9):
            for params, optimizer in ((ours, mine), (theirs, oracle)):
                give_gradients(params, step)
                if step < 3 or step == 6:
                    params[0].grad = None
                if step == 4:
                    for p in params:
                        p.grad = None
                if step == 5:
                    optimizer.add_param_group({"params": params[-1:], "lr": 1e-2})
                optimizer.step()
        assert_same(ours, theirs, rtol=1e-5, atol=1e-6)
        assert [mine.state[p]["step"].item() for p in ours] == [
            oracle.state[p]["step"].item() for p in theirs
        ]

    def test_schedulers_change_the_rate(self) -> None:
        """Among them one that also moves betas."""
        for make in (
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
            lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
            lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
        ):
            ours, theirs = parameters(), parameters()
            for params, optimizer in ((ours, AdamW(ours)), (theirs, torch.optim.AdamW(theirs))):
                scheduler = make(optimizer)
                for step in range(8):
                    give_gradients(params, step)
                    optimizer.step()
                    scheduler.step()
            assert_same(ours, theirs, rtol=1e-5, atol=1e-6)

    def test_tensor_learning_rate(self) -> None:
        """A tensor lr is read at each step."""
        ours, theirs = parameters(), parameters()
        for params, kind in ((ours, AdamW), (theirs, torch.optim.AdamW)):
            optimizer = kind(params, lr=torch.tensor(1e-3))
            train(optimizer, params, range(2))
            optimizer.param_groups[0]["lr"].fill_(1e-2)
            train(optimizer, params, range(2, 4))
        assert_same(ours, theirs, rtol=1e-5, atol=1e-6)

    def test_closure_and_hooks(self) -> None:
        """step(closure) returns the loss; step and state-dict hooks run."""
        param, called = nn.Parameter(torch.ones(3)), []
        optimizer = AdamW([param])
        optimizer.register_step_pre_hook(lambda *_: called.append("before"))
        optimizer.register_step_post_hook(lambda *_: called.append("after"))
        optimizer.register_state_dict_post_hook(lambda *_: called.append("saved"))
        optimizer.register_load_state_dict_pre_hook(lambda *_: called.append("loading"))
        optimizer.register_load_state_dict_post_hook(lambda *_: called.append("loaded"))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = param.square().sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 3.0
        optimizer.load_state_dict(optimizer.state_dict())
        assert called == ["before", "after", "saved", "loading", "loaded"]

    def test_grad_scaler(self) -> None:
        """A step with an infinite gradient is skipped, the others unscaled."""
        ours, theirs = parameters(), parameters()
        for params, kind in ((ours, AdamW), (theirs, torch.optim.AdamW)):
            optimizer, scaler = kind(params), torch.amp.GradScaler("cpu", init_scale=8.0)
            for step in range(4):
                scaler.scale(torch.zeros(()))
                give_gradients(params, step)
                for p in params:
                    p.grad.mul_(scaler.get_scale())
                if step == 2:
                    params[0].grad[0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
        assert_same(ours, theirs, rtol=1e-5, atol=1e-6)

    def test_moved_parameters_are_found(self) -> None:
        """Swapping param.data between steps must not write into the old memory."""
        param = nn.Parameter(torch.ones(5000))
        optimizer = AdamW([param], lr=1e-2)
        train(optimizer, [param], range(1))
        old = param.data
        kept = old.clone()
        param.data = old.clone()
        train(optimizer, [param], range(1, 2))
        assert torch.equal(old, kept)
        assert not torch.equal(param.data, kept)

    @pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
    def test_a_change_of_memory_format_keeps_the_state(self, state: str) -> None:
        """Blocks follow the memory, so state in blocks is stored anew when a model becomes channels_last."""
        param = nn.Parameter(torch.randn(8, 64, 3, 3) * torch.logspace(-3, 3, 8).view(8, 1, 1, 1))
        optimizer = AdamW([param], state=state, betas=(0.9, 0.9))
        for scale in torch.logspace(-2, 2, 3):
            param.grad = scale * param.detach().clone()
            optimizer.step()
        before = optimizer.dequantized_state(param)
        param.data = param.data.to(memory_format=torch.channels_last)
        for name, values in optimizer.dequantized_state(param).items():
            assert torch.equal(values, before[name])
        param.grad = torch.zeros_like(param)
        optimizer.step()
        for name, values in optimizer.dequantized_state(param).items():
            error = (values - 0.9 * before[name]).norm() / before[name].norm()
            assert error < 0.03, f"{name} is off by {error:.3f}"
        assert optimizer.state[param]["exp_avg"].is_contiguous(memory_format=torch.channels_last)

    def test_a_gradient_of_another_dtype_steps_nothing_twice(self) -> None:
        """One plan finds that it must be bound anew: the plan before it has not run yet."""
        params = [nn.Parameter(torch.ones(5000)), nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))]
        if not hasattr(params[1], "grad_dtype"):
            pytest.skip("platform: this torch keeps a gradient's dtype to its parameter's")
        params[1].grad_dtype = None
        optimizer = AdamW(params)
        train(optimizer, params, range(2))
        give_gradients(params, 2)
        params[1].grad = params[1].grad.float()
        optimizer.step()
        assert [optimizer.state[p]["step"].item() for p in params] == [3, 3]

    def test_tied_weights_step_once(self) -> None:
        """One parameter in two modules is one parameter."""
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        model[1].weight = model[0].weight
        optimizer = AdamW(model.parameters())
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        assert optimizer.state[model[0].weight]["step"].item() == 1

    def test_gradients_survive(self) -> None:
        """The step reads gradients and leaves them alone."""
        params = parameters()
        optimizer = AdamW(params, state="int8")
        give_gradients(params, 0)
        before = [p.grad.clone() for p in params]
        optimizer.step()
        for p, grad in zip(params, before, strict=True):
            assert torch.equal(p.grad, grad)


class TestStatistics:
    """What subscribers hear."""

    def test_full_in_one_of_every_steps(self) -> None:
        """The first step is full, then one of so many."""
        param = nn.Parameter(torch.ones(10))
        optimizer = AdamW([param])
        heard: list[StepStats] = []
        stop = optimizer.subscribe(heard.append, every=3)
        train(optimizer, [param], range(7))
        assert [stats.full for stats in heard] == [True, False, False, True, False, False, True]
        stop()
        train(optimizer, [param], range(2))
        assert len(heard) == 7

    def test_a_step_without_gradients_has_no_rows(self) -> None:
        """Nothing ran, and the subscriber hears that."""
        param = nn.Parameter(torch.ones(10))
        optimizer = AdamW([param])
        heard: list[StepStats] = []
        optimizer.subscribe(heard.append)
        optimizer.step()
        assert heard[0].plans == ()

    @pytest.mark.parametrize(("state", "backend"), FORMATS_ON_BACKENDS)
    def test_statistics_change_no_bit(self, state: str, backend: str) -> None:
        """200 steps with and without a subscriber."""
        ours, theirs = parameters(), parameters()
        listened = AdamW(ours, state=state, backend=backend)
        listened.subscribe(lambda _: None, every=3)
        train(listened, ours, range(200))
        train(AdamW(theirs, state=state, backend=backend), theirs, range(200))
        assert_same(ours, theirs, rtol=0, atol=0)


class TestBadInput:
    """Errors name what was given, what was expected and what to do."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"state": "int9"}, "unknown state format 'int9': use one of 'fp32', 'bf16', 'int8'"),
            ({"backend": "cuda"}, "unknown backend 'cuda': use one of 'triton', 'cpu', 'reference'"),
            ({"lr": -1}, "lr=-1 is out of range: expected a number of at least 0"),
            ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) is out of range: expected two numbers of \[0, 1\)"),
            ({"differentiable": True}, "differentiable=True is not supported"),
        ],
        ids=str,
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        """At construction."""
        with pytest.raises(ValueError, match=message):
            AdamW([nn.Parameter(torch.ones(3))], **options)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float16], ids=str)
    def test_dtypes_name_the_parameter(self, dtype: torch.dtype) -> None:
        """A late group too, which is then not added."""
        good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=dtype))
        with pytest.raises(ValueError, match=f"parameter 'head.w' has dtype {dtype}; supported are"):
            AdamW([("body.w", good), ("head.w", bad)])
        optimizer = AdamW([good])
        with pytest.raises(ValueError, match=r"parameter 0 of group 1 \(shape \(3,\)\) has dtype"):
            optimizer.add_param_group({"params": [bad]})
        assert len(optimizer.param_groups) == 1

    def test_sparse_gradients(self) -> None:
        """Refused by name."""
        param = nn.Parameter(torch.ones(3, 3))
        optimizer = AdamW([("table", param)])
        param.grad = torch.eye(3).to_sparse()
        with pytest.raises(RuntimeError, match=r"parameter 'table' has a torch\.sparse_coo gradient"):
            optimizer.step()

    def test_every_of_a_subscription(self) -> None:
        """At least one."""
        with pytest.raises(ValueError, match="every=0: expected a number of steps"):
            AdamW([nn.Parameter(torch.ones(3))]).subscribe(lambda _: None, every=0)

    def test_state_that_is_no_state(self) -> None:
        """Somebody put something else into optimizer.state."""
        param = nn.Parameter(torch.ones(5000))
        optimizer = AdamW([("w", param)], state="int8")
        train(optimizer, [param], range(1))
        optimizer.state[param]["exp_avg"] = torch.zeros(7)
        with pytest.raises(
            ValueError, match=r"state of parameter 'w' does not fit: slot 'exp_avg' has shape \(7,\)"
        ):
            train(optimizer, [param], range(1))

    def test_pickled_bytes_hold_no_pointer(self) -> None:
        """What is saved is plain tensors."""
        param = nn.Parameter(torch.ones(5000))
        optimizer = AdamW([param], state="int8")
        train(optimizer, [param], range(1))
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        assert torch.load(buffer, weights_only=True)["state"][0]["exp_avg"].dtype == torch.int8
