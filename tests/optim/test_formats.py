"""Choosing formats for groups and slots, and packed state in checkpoints and memory orders."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from optwatch.optim import AdamW, StateKind, replace
from tests.optim.training import assert_same, parameters, train

MIXED = {"exp_avg": "int4", "exp_avg_sq": "bf16"}


def saved(optimizer: torch.optim.Optimizer) -> dict:
    """Its state dict, as a file gives it back."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class TestFormatOfEachSlot:
    """``state=`` as a mapping."""

    def test_each_slot_has_its_own(self) -> None:
        """The tensors, the bytes, small tensors, and a group that differs."""
        params = [nn.Parameter(torch.randn(5000)) for _ in range(2)] + [nn.Parameter(torch.randn(10))]
        groups = [
            {"params": params[:1]},
            {"params": params[1:], "state": {"exp_avg_sq": "int8", "default": "fp32"}},
        ]
        optimizer = AdamW(groups, state=MIXED, backend="reference")
        train(optimizer, params, range(2))
        found = [
            (optimizer.state[p]["exp_avg"].dtype, optimizer.state[p]["exp_avg_sq"].dtype) for p in params
        ]
        assert found == [
            (torch.uint8, torch.bfloat16),
            (torch.float32, torch.uint8),
            (torch.float32, torch.float32),
        ]
        assert optimizer.state_bytes() == optimizer.expected_state_bytes()
        assert optimizer.state_bytes()[StateKind("exp_avg", "uint8", "cpu")] == 2500

    def test_a_checkpoint_continues_bit_by_bit(self) -> None:
        """Through a file."""
        params, others = parameters(), parameters()
        optimizer, second = (AdamW(p, state=MIXED, backend="reference") for p in (params, others))
        train(optimizer, params, range(3))
        second.load_state_dict(saved(optimizer))
        for other, param in zip(others, params, strict=True):
            other.data.copy_(param.data)
        train(optimizer, params, range(3, 6))
        train(second, others, range(3, 6))
        assert_same(params, others, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"exp_avg": "int8"}, "state= has no format for 'exp_avg_sq': name one, or one for 'default'"),
            (
                {"exp_avg_sqr": "int8", "default": "fp32"},
                "a slot 'exp_avg_sqr' that this optimizer does not keep: use 'exp_avg', 'exp_avg_sq', 'default'",
            ),
            ({"default": "int5"}, "unknown state format 'int5': use one of 'fp32', .*'int4'"),
        ],
    )
    def test_a_wrong_mapping_is_refused(self, state: dict, message: str) -> None:
        """By the constructor and for a group added later, which changes nothing."""
        param = nn.Parameter(torch.zeros(3))
        with pytest.raises(ValueError, match=message):
            AdamW([param], state=state)
        optimizer = AdamW([param])
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "state": state})
        assert len(optimizer.param_groups) == 1


def choose(name: str) -> str | dict[str, str]:
    """A rule as a function."""
    if "norm" in name:
        return "fp32"
    return {"exp_avg": "int4", "default": "bf16"} if name.startswith("embed") else "int8"


class TestFormatByName:
    """``state=`` as a rule on parameters' names."""

    PATTERNS = {  # noqa: RUF012 - a constant
        "*norm*": "fp32",
        "embed*": {"exp_avg": "int4", "default": "bf16"},
        "default": "int8",
    }
    WANTED = {  # noqa: RUF012 - a constant
        "embed.weight": (torch.uint8, torch.bfloat16),
        "embed_norm.weight": (torch.float32, torch.float32),
        "head.weight": (torch.int8, torch.uint8),
    }

    def named(self) -> dict[str, nn.Parameter]:
        return {name: nn.Parameter(torch.randn(64, 80)) for name in self.WANTED}

    @pytest.mark.parametrize("rule", [PATTERNS, choose], ids=["patterns", "function"])
    def test_the_rule_decides(self, rule: object) -> None:
        """State, predicted bytes, and a checkpoint that goes through a file: the first pattern that matches counts."""
        params = self.named()
        optimizer = AdamW(params.items(), state=rule, backend="reference")
        train(optimizer, list(params.values()), range(2))
        for name, dtypes in self.WANTED.items():
            state = optimizer.state[params[name]]
            assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == dtypes
        assert optimizer.state_bytes() == optimizer.expected_state_bytes()
        second = AdamW(self.named().items(), state=rule, backend="reference")
        second.load_state_dict(saved(optimizer))
        assert second.state_bytes() == optimizer.state_bytes()
        copy.deepcopy(optimizer).step()
        pickle.dumps(optimizer)

    def test_groups_and_conversions_follow_it(self) -> None:
        """A rule for one group, a format for the other; a checkpoint in fp32 is converted by parameter."""
        params = self.named()
        exact = AdamW(params.items())
        train(exact, list(params.values()), range(2))
        first, *others = params.items()
        groups = [{"params": [first]}, {"params": others, "state": "bf16"}]
        optimizer = AdamW(groups, state=self.PATTERNS, backend="reference")
        exact_groups = AdamW([{"params": [first]}, {"params": others}])
        train(exact_groups, list(params.values()), range(2))
        with pytest.raises(
            ValueError, match=r"'exp_avg' of parameter 'embed.weight' as fp32, state=.*int4_power"
        ):
            optimizer.load_state_dict(exact_groups.state_dict())
        optimizer.load_state_dict(exact_groups.state_dict(), convert=True)
        assert optimizer.state_conversions == 6
        assert optimizer.state_bytes() == optimizer.expected_state_bytes()
        assert optimizer.state[first[1]]["exp_avg"].dtype == torch.uint8
        assert optimizer.state[others[0][1]]["exp_avg"].dtype == torch.bfloat16

    def test_taking_over_a_torch_optimizer(self) -> None:
        """Its names are used."""
        params = self.named()
        before = torch.optim.AdamW(params.items())
        train(before, list(params.values()), range(2))
        taken = replace(before, state=self.PATTERNS, backend="reference")
        assert taken.state[params["embed.weight"]]["exp_avg"].dtype == torch.uint8

    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            (
                {"*norm*": "fp32"},
                "the format of parameter 'embed.weight': state= has no format for 'exp_avg', 'exp",
            ),
            (
                {"*norm*": "fp33", "default": "int8"},
                "the format of parameter 'embed_norm.weight': unknown state for",
            ),
            (
                lambda _: {"moment": "fp32"},
                "the format of parameter 'embed.weight': state= names a slot 'moment'",
            ),
            (lambda _: None, "the format of parameter 'embed.weight': unknown state format None"),
        ],
    )
    def test_a_wrong_rule_is_refused(self, rule: object, message: str) -> None:
        """By the parameter's name."""
        with pytest.raises(ValueError, match=message):
            AdamW(self.named().items(), state=rule)

    def test_names_are_needed(self) -> None:
        """And the message says where they come from."""
        with pytest.raises(
            ValueError, match=r"the parameters have none: construct .* model\.named_parameters\(\)"
        ):
            AdamW([nn.Parameter(torch.zeros(3))], state={"*norm*": "fp32", "default": "int8"})


class TestPackedState:
    """Two codes a byte have not the parameter's shape."""

    @pytest.mark.parametrize("numel", [4096, 4097])
    def test_is_flat(self, numel: int) -> None:
        """Half as many bytes as elements, rounded up."""
        param = nn.Parameter(torch.randn(numel, 1))
        optimizer = AdamW([param], state="int4", backend="reference")
        train(optimizer, [param], range(1))
        assert optimizer.state[param]["exp_avg"].shape == ((numel + 1) // 2,)
        assert optimizer.dequantized_state(param)["exp_avg_sq"].shape == param.shape

    def test_every_memory_order_gives_the_same_values_as_its_own_elements(self) -> None:
        """State decodes to where the gradient was."""
        for param in parameters():
            optimizer = AdamW([param], state="int4", backend="reference")
            param.grad = (torch.arange(param.numel()).view(param.shape) % 2 == 0).to(param.dtype)
            optimizer.step()
            for value in optimizer.dequantized_state(param).values():
                assert torch.equal(value != 0, param.grad != 0)

    def test_another_memory_order_is_refused(self) -> None:
        """Codes in the order of a channels_last image would be taken for other elements'."""
        image = torch.randn(8, 64, 3, 3)
        last = nn.Parameter(image.to(memory_format=torch.channels_last))
        source = AdamW([("conv", last)], state="int4", backend="reference")
        train(source, [last], range(1))
        assert source.state[last]["exp_avg"].shape == (1, 2304, 1, 1)
        target = AdamW([("conv", nn.Parameter(image))], state="int4", backend="reference")
        for convert in (False, True):
            with pytest.raises(
                ValueError,
                match=r"of parameter 'conv' does not fit: slot 'exp_avg' has shape \(1, 2304, 1, 1\), the parameter "
                r"\(8, 64, 3, 3\), of which int4_power makes \(2304,\)",
            ):
                target.load_state_dict(source.state_dict(), convert=convert)
        assert not target.state

    def test_a_truncated_one_is_refused(self) -> None:
        """By its length."""
        param = nn.Parameter(torch.randn(5000))
        optimizer = AdamW([param], state="int4", backend="reference")
        train(optimizer, [param], range(1))
        broken = saved(optimizer)
        broken["state"][0]["exp_avg_sq"] = broken["state"][0]["exp_avg_sq"][:-1]
        with pytest.raises(ValueError, match=r"'exp_avg_sq' has shape \(2499,\)"):
            AdamW([param], state="int4", backend="reference").load_state_dict(broken)

    @pytest.mark.parametrize("state", ["int8", "int8_dynamic", "fp8", "int4"])
    def test_conversion_both_ways(self, state: str) -> None:
        """From fp32 and back, in every layout; each value stays near."""
        params = parameters()
        exact, low, back = (AdamW(params, state=s, backend="reference") for s in ("fp32", state, "fp32"))
        train(exact, params, range(3))
        with pytest.raises(ValueError, match=f"as fp32, state='{state}' asks for {state}"):
            low.load_state_dict(saved(exact))
        low.load_state_dict(saved(exact), convert=True)
        assert low.state_bytes() == low.expected_state_bytes()
        back.load_state_dict(saved(low), convert=True)
        assert back.state_bytes() == back.expected_state_bytes()
        for param in params:
            for name, value in exact.dequantized_state(param).items():
                kept = back.dequantized_state(param)[name]
                assert torch.equal(kept, low.dequantized_state(param)[name])
                assert (kept - value).norm() <= 0.4 * value.norm()
