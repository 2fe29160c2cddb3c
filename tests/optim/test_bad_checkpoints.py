"""Checkpoints that are damaged in any entry, of this library and of others: refused by name, and nothing changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from optwatch import optim
from optwatch.optim.interchange.bitsandbytes import WRAPPED
from optwatch.optim.interchange.flashoptim import CODES, SCALES
from tests.optim.training import train

SHAPE = (64, 80)
Saved = dict[str, Any]


class Source(NamedTuple):
    """Who wrote a checkpoint of one parameter, and who loads it."""

    write: Callable[[nn.Parameter], Saved]
    load: Callable[[nn.Parameter], optim.Optimizer]
    convert: bool = True  # whether as an export of another library or format
    dtype: torch.dtype = torch.float32


def stepped(kind: Any, **options: Any) -> Callable[[nn.Parameter], Saved]:
    """The state dict of an optimizer after two steps."""

    def write(param: nn.Parameter) -> Saved:
        optimizer = kind([("layer.w", param)], **options)
        train(optimizer, [param], range(2))
        return copy.deepcopy(optimizer.state_dict())

    return write


def loading(kind: Any, **options: Any) -> Callable[[nn.Parameter], optim.Optimizer]:
    return lambda param: kind([("layer.w", param)], **options)


def bitsandbytes(param: nn.Parameter) -> Saved:
    """A checkpoint in bitsandbytes' layout."""
    optimizer = optim.AdamW([param], state="int8_dynamic")
    train(optimizer, [param], range(2))
    return copy.deepcopy(optimizer.export_state_dict("bitsandbytes"))


def flashoptim(param: nn.Parameter) -> Saved:
    """A checkpoint in FlashOptim's layout."""
    codes = torch.arange(param.numel()).view(SHAPE) % 200
    scales = torch.ones(param.numel() // 32, dtype=torch.float16)
    state: Saved = {"step": torch.tensor(3.0)}
    for slot, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
        state |= {slot + CODES: codes.sub(72 if dtype is torch.int8 else 0).to(dtype), slot + SCALES: scales}
    if param.dtype == torch.bfloat16:
        state["error_bits"] = torch.ones(SHAPE, dtype=torch.int8)
    return {"state": {0: state}, "param_groups": [{"lr": 0.1, "master_bytewidth": 4, "params": [0]}]}


SOURCES = {
    "int8": Source(stepped(optim.AdamW, state="int8"), loading(optim.AdamW, state="int8"), convert=False),
    "int4": Source(stepped(optim.AdamW, state="int4"), loading(optim.AdamW, state="int4"), convert=False),
    "amsgrad": Source(
        stepped(optim.Adam, amsgrad=True), loading(optim.Adam, state="fp8", amsgrad=True)
    ),
    "SGD": Source(
        stepped(optim.SGD, momentum=0.9, state="bf16"), loading(optim.SGD, momentum=0.9, state="bf16"), convert=False
    ),
    "torch": Source(stepped(torch.optim.AdamW), loading(optim.AdamW), convert=False),
    "torch to int8": Source(stepped(torch.optim.AdamW), loading(optim.AdamW, state="int8")),
    "bitsandbytes": Source(bitsandbytes, loading(optim.AdamW, state="int8_dynamic")),
    "FlashOptim": Source(flashoptim, loading(optim.AdamW, state="int8")),
    "FlashOptim bf16": Source(flashoptim, loading(optim.AdamW, weights="split8"), dtype=torch.bfloat16),
    "split16": Source(
        stepped(optim.SGD, weights="split16"), loading(optim.SGD, weights="split16"), False, torch.bfloat16
    ),
}  # fmt: skip

#: What can become of an entry; None for what cannot befall it.
DAMAGE: dict[str, Callable[[Any], Any]] = {
    "lost": lambda value: None,
    "a list": lambda value: [1.0, 2.0],
    "text": lambda value: "0.5",
    "truncated": lambda value: value[:-1] if value.dim() else torch.zeros(2),
    "one more dimension": lambda value: value[None] if value.dim() else value.new_zeros(1, 2),
    "complex": lambda value: value.to(torch.complex64),
    "not finite": lambda value: value if value.dim() else value / 0,
}


def entries(source: Source) -> list[str]:
    return list(tensors_of(source.write(nn.Parameter(torch.ones(SHAPE, dtype=source.dtype)))))


def tensors_of(saved: Saved) -> Saved:
    """Where a checkpoint has the tensors of its parameter."""
    found: Saved = saved["state"][0]
    return found.get(WRAPPED, found)


CASES = [
    pytest.param(source, entry, damage, id=f"{name}-{entry}-{damage}")
    for name, source in SOURCES.items()
    for entry in entries(source)
    for damage in (*DAMAGE, "renamed")
    if damage != ("complex" if entry == "step" else "not finite")
    if not (
        entry == "step" and damage in ("lost", "renamed") and name in ("SGD", "split16")
    )  # torch's has none
    if not (entry == "error_bits" and damage in ("lost", "renamed"))  # a conversion begins without
    if not (entry.endswith(SCALES) and damage == "one more dimension")  # any shape of so many does
]


def spoil(state: Saved, entry: str, damage: str) -> None:
    if damage == "renamed":
        state["x_" + entry] = state.pop(entry)
    elif damage == "lost":
        del state[entry]
    else:
        state[entry] = DAMAGE[damage](state[entry])


def bits(value: Any) -> Any:
    """Something that is equal exactly if the value is, bit by bit."""
    if isinstance(value, Tensor):
        content = value.contiguous().view(-1).view(torch.uint8).tolist()
        return value.dtype, tuple(value.shape), value.stride(), content
    if isinstance(value, Mapping):
        return {key: bits(inner) for key, inner in value.items()}
    return value


class Kept:
    """An optimizer in the middle of a run, and everything that must be as it was."""

    def __init__(self, source: Source) -> None:
        self.param = nn.Parameter(
            torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(source.dtype)
        )
        self.saved = source.write(nn.Parameter(self.param.detach().clone()))
        self.optimizer = source.load(self.param)
        train(self.optimizer, [self.param], range(2))
        self.before = self.all()

    def all(self) -> Any:
        state = self.optimizer.state_dict()
        counted = self.optimizer.state_conversions
        return bits(self.param.detach()), bits(state["state"][0]), state["param_groups"], counted

    def refuses(self, convert: bool, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.optimizer.load_state_dict(self.saved, convert=convert)
        assert self.all() == self.before
        train(self.optimizer, [self.param], range(2, 3))


@pytest.mark.parametrize(("source", "entry", "damage"), CASES)
def test_a_damaged_entry_is_refused(source: Source, entry: str, damage: str) -> None:
    """With the parameter's name; weights, state and options are those of before, bit by bit, and it trains on."""
    kept = Kept(source)
    spoil(tensors_of(kept.saved), entry, damage)
    kept.refuses(source.convert, r"parameter 'layer\.w'")


OPTIONS = [
    ("int8", "lr", "fast", "lr='fast' is out of range: expected a number of at least 0"),
    ("int8", "betas", 0.9, r"betas=0\.9 is out of range: expected two numbers"),
    ("int8", "betas", ("a", "b"), r"betas=\('a', 'b'\) is out of range"),
    ("int8", "eps", None, "eps=None is out of range"),
    ("int8", "schema", 2, "the checkpoint has schema 2; this version of optwatch reads 1"),
    ("int8", "schema", None, "the checkpoint has schema None"),
    ("SGD", "amsgrad", True, "amsgrad=True: optwatch.optim.SGD has no amsgrad"),
    ("torch", "momentum", 0.9, "momentum=0.9: optwatch.optim.AdamW has no momentum"),
    ("torch", "differentiable", True, "differentiable=True is not supported"),
    ("bitsandbytes", "betas", ..., "the options of group 0 are none of bitsandbytes: KeyError"),
    ("bitsandbytes", "lr", ..., "the options of group 0 are none of bitsandbytes: KeyError"),
    ("FlashOptim", "lr", torch.ones(3), "Tensor lr must be 1-element"),
]


@pytest.mark.parametrize(("name", "option", "value", "message"), OPTIONS)
def test_a_damaged_option_is_refused(name: str, option: str, value: Any, message: str) -> None:
    """By its name; an ellipsis takes it away."""
    kept = Kept(SOURCES[name])
    group = kept.saved["param_groups"][0]
    group[option] = value
    if value is ...:
        del group[option]
    kept.refuses(SOURCES[name].convert, message)
