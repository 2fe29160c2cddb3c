"""State of other libraries, read from and written for the installed libraries themselves."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from optwatch import optim
from optwatch.optim.interchange.bitsandbytes import WRAPPED
from tests.optim.training import assert_same, train

SHAPES = ((64, 80), (10,), (4100,), (128, 128))
Make = Callable[..., torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """Torchao compiles its step, which takes longer than everything here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def plain(seed: int = 0) -> list[nn.Parameter]:
    """Row-major parameters, as the peers take them, small and quantised ones."""
    gen = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=gen)) for shape in SHAPES]


class Pair(NamedTuple):
    """A peer's optimizer and ours of the same mathematics."""

    module: str
    name: str
    ours: type[optim.Optimizer]
    options: dict[str, Any]
    exact: str | None  # the format of ours that holds the peer's very codes
    theirs: dict[str, Any] | None = None  # the peer's options where they are called otherwise
    exports: bool = False

    def peer(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        module = pytest.importorskip(self.module)
        return getattr(module, self.name)(params, **(self.options if self.theirs is None else self.theirs))

    def mine(self, params: list[nn.Parameter], state: str) -> optim.Optimizer:
        # The rate, the decay and all else come from the checkpoint.
        return self.ours(params, lr=123.0, state=state, backend="reference", **self.needed())

    def needed(self) -> dict[str, Any]:
        """What decides which slots there are."""
        return {name: value for name, value in self.options.items() if name == "momentum"}

    def __str__(self) -> str:
        return f"{self.module.split('.')[0]}-{self.name}"


ADAM = {"lr": 1e-2, "betas": (0.8, 0.98), "weight_decay": 0.1}
BNB = "bitsandbytes.optim"
PAIRS = [
    Pair(BNB, "Adam8bit", optim.Adam, {"lr": 1e-2, "betas": (0.8, 0.98)}, "int8_dynamic", exports=True),
    Pair(BNB, "AdamW8bit", optim.AdamW, ADAM, "int8_dynamic", exports=True),
    Pair(BNB, "Adam8bit", optim.Adam, ADAM, "int8_dynamic"),  # decays as AdamW does
    Pair(BNB, "AdamW32bit", optim.AdamW, ADAM, "fp32"),
    Pair(BNB, "Lion8bit", optim.Lion, {"lr": 1e-3, "weight_decay": 0.1}, "int8_dynamic", exports=True),
    Pair(
        BNB,
        "SGD8bit",
        optim.SGD,
        {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1},
        "int8_dynamic",
        exports=True,
    ),
    Pair(
        BNB, "RMSprop8bit", optim.RMSprop, {"lr": 1e-2, "alpha": 0.9, "weight_decay": 0.1}, None, exports=True
    ),
    Pair(BNB, "Adagrad8bit", optim.Adagrad, {"lr": 1e-2, "weight_decay": 0.1}, None, exports=True),
    Pair(
        BNB,
        "AdEMAMix8bit",
        optim.AdEMAMix,
        {"lr": 1e-2, "alpha": 4.0, "weight_decay": 0.1, "alpha_warmup": 20, "beta3_warmup": 30},
        "int8_dynamic",
        {"lr": 1e-2, "alpha": 4.0, "weight_decay": 0.1, "t_alpha": 20, "t_beta3": 30},
        exports=True,
    ),
    Pair("torchao.optim", "AdamW8bit", optim.AdamW, ADAM, "int8_dynamic"),
    Pair("torchao.optim", "AdamWFp8", optim.AdamW, ADAM, "fp8"),
    Pair("torchao.optim", "AdamW4bit", optim.AdamW, ADAM, None),
    Pair("torchao.optim", "Adam8bit", optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}, "int8_dynamic"),
]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint comes back."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_peers_run_goes_on(pair: Pair) -> None:
    """The next step from the loaded state is the peer's own: state, options and step count were read."""
    theirs = [p for p in plain() if pair.module == BNB or p.numel() != 4100]  # torchao keeps that one in fp32
    peer = pair.peer(theirs)
    train(peer, theirs, range(5))
    ours = copies(theirs)
    mine = pair.mine(ours, pair.exact or "fp32")
    with pytest.raises(ValueError, match=r"the checkpoint is one of \w+: load it with convert=True"):
        mine.load_state_dict(peer.state_dict())
    assert not mine.state
    mine.load_state_dict(through_a_file(peer.state_dict()), convert=True)
    assert mine.state_bytes() == mine.expected_state_bytes()
    slots = len(mine.slot_names())
    assert mine.state_conversions == slots * len(ours)
    train(mine, ours, range(5, 6))
    train(peer, theirs, range(5, 6))
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)


EXPORTED = [pair for pair in PAIRS if pair.exports]


@pytest.mark.parametrize("pair", EXPORTED, ids=str)
@pytest.mark.parametrize("state", ["fp32", "int8", "int8_dynamic"])
def test_bitsandbytes_goes_on_from_ours(pair: Pair, state: str) -> None:
    """Its next step from the exported state is ours, but for the error of its format where ours is another one."""
    ours = plain()
    mine = pair.ours(ours, state=state, backend="reference", **pair.options)
    train(mine, ours, range(5))
    theirs = copies(ours)
    before = [param.detach().clone() for param in ours]
    options = pair.options if pair.theirs is None else pair.theirs
    fresh = {"lr": 1.0} | {name: value for name, value in options.items() if name in {"momentum", "alpha"}}
    peer = pair._replace(theirs=fresh).peer(theirs)
    peer.load_state_dict(through_a_file(mine.export_state_dict("bitsandbytes")))
    train(mine, ours, range(5, 6))
    train(peer, theirs, range(5, 6))
    signs = pair.ours is optim.Lion  # a sign is right or wrong
    for start, one, other in zip(before, ours, theirs, strict=True):
        same = one.numel() < 4096 or state == pair.exact
        error = (one - other).norm() / (one - start).norm()
        assert error < (1e-5 if same else 0.3 if signs else 0.05)


@pytest.mark.parametrize("pair", [p for p in EXPORTED if p.exact], ids=str)
def test_bitsandbytes_state_comes_back_bit_by_bit(pair: Pair) -> None:
    """Through our int8_dynamic: tensors, step counts and options."""
    theirs = plain()
    peer = pair.peer(theirs)
    train(peer, theirs, range(5))
    mine = pair.mine(theirs, "int8_dynamic")
    mine.load_state_dict(peer.state_dict(), convert=True)
    saved, back = peer.state_dict(), mine.export_state_dict("bitsandbytes")
    assert back["param_groups"] == saved["param_groups"]
    for number, state in saved["state"].items():
        assert back["state"][number]["step"] == state["step"]
        assert back["state"][number][WRAPPED].keys() == state[WRAPPED].keys()
        for name, tensor in state[WRAPPED].items():
            assert torch.equal(back["state"][number][WRAPPED][name], tensor), name


def saved_by_bitsandbytes() -> dict[str, Any]:
    """A checkpoint of one parameter."""
    module = pytest.importorskip("bitsandbytes.optim")
    param = nn.Parameter(torch.randn(64, 80))
    optimizer = module.AdamW8bit([param])
    train(optimizer, [param], range(2))
    return through_a_file(optimizer.state_dict())


def damage(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Replace tensors of the checkpoint; None deletes one."""

    def apply(tensors: dict[str, Any]) -> None:
        for name, change in changes.items():
            tensors[name] = change(tensors[name]) if change else None
            if change is None:
                del tensors[name]

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage(state2=None), "'state2' should be a tensor, found"),
        (damage(absmax1=None), "'absmax1' should be a tensor, found"),
        (damage(absmax1=lambda t: t[:-1]), "'absmax1' has 19 values, expected 20"),
        (damage(state1=lambda t: t[:-1]), r"'state1' has shape \(63, 80\), expected \(64, 80\)"),
        (damage(state1=lambda t: t.t().contiguous().t()), "'state1' has strides"),
    ],
)
def test_a_damaged_checkpoint_is_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    """By the name of the parameter, with what was found and expected; the optimizer stays as it was."""
    saved = saved_by_bitsandbytes()
    change(saved["state"][0][WRAPPED])
    mine = optim.AdamW([("layer.w", nn.Parameter(torch.randn(64, 80)))], lr=0.7)
    with pytest.raises(
        ValueError, match=f"bitsandbytes's state of parameter 'layer.w' does not fit: {message}"
    ):
        mine.load_state_dict(saved, convert=True)
    assert not mine.state
    assert mine.param_groups[0]["lr"] == 0.7


def test_blocks_of_before_and_a_map_of_its_own_are_decoded() -> None:
    """Bitsandbytes had blocks of 2048, and its users may fill the map."""
    saved = saved_by_bitsandbytes()
    tensors = saved["state"][0][WRAPPED]
    tensors["absmax1"] = torch.tensor([1.0, 2.0, 4.0])
    tensors["qmap2"] = tensors["qmap2"] ** 2
    param = nn.Parameter(torch.randn(64, 80))
    mine = optim.AdamW([param])
    mine.load_state_dict(saved, convert=True)
    found = mine.dequantized_state(param)
    scale = torch.tensor([1.0] * 2048 + [2.0] * 2048 + [4.0] * 1024).view(64, 80)
    assert torch.equal(found["exp_avg"], tensors["qmap1"][tensors["state1"].long()] * scale)
    absmax = tensors["absmax2"].repeat_interleave(256).view(64, 80)
    assert torch.equal(found["exp_avg_sq"], tensors["qmap2"][tensors["state2"].long()] * absmax)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda p: optim.AdamW(p, amsgrad=True), "bitsandbytes has no adamw_amsgrad, only adam, adamw"),
        (
            lambda p: optim.Adam(p, weight_decay=0.1),
            "bitsandbytes' adam has no weight_decay as a part of the grad",
        ),
        (lambda p: optim.AdamW(p, maximize=True), "bitsandbytes' adamw has no maximize"),
        (lambda p: optim.SGD(p, momentum=0.9, nesterov=True), "bitsandbytes' sgd_momentum has no nesterov"),
    ],
)
def test_what_bitsandbytes_would_ignore_is_not_exported(made: Callable[..., Any], message: str) -> None:
    """Nor is there a layout of another name."""
    mine = made([nn.Parameter(torch.randn(3))])
    with pytest.raises(ValueError, match=message):
        mine.export_state_dict("bitsandbytes")
    with pytest.raises(ValueError, match="cannot export to 'tf': use one of 'torch', 'bitsandbytes'"):
        mine.export_state_dict("tf")


FLASH = {"AdamW": optim.AdamW, "Adam": optim.Adam, "Lion": optim.Lion, "SGD": optim.SGD}


@pytest.fixture(scope="module")
def flash_runs(tmp_path_factory: Any) -> dict[Any, Any]:
    """What flashoptim_run.py found."""
    pytest.importorskip("flashoptim", reason="platform: FlashOptim needs Triton, which is for Linux only")
    file = tmp_path_factory.mktemp("flash") / "runs.pt"
    program = Path(__file__).parent / "flashoptim_run.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, program, file], check=True, env=environment, timeout=300)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "key",
    [
        "AdamW torch.float32 True",
        "AdamW torch.float32 False",
        "AdamW torch.bfloat16 True",
        "Adam torch.float32 True",
        "Lion torch.float32 True",
        "SGD torch.float32 True",
    ],
)
def test_a_run_of_flashoptim_goes_on(flash_runs: Any, key: str) -> None:
    """Its next step is ours, to a rounding of the weight; with and without compressed state."""
    run, name = flash_runs[key], key.partition(" ")[0]
    params = [nn.Parameter(param) for param in run["before"]]
    more = {"momentum": 0.9} if name == "SGD" else {}
    mine = FLASH[name](params, lr=123.0, backend="reference", **more)
    mine.load_state_dict(run["checkpoint"], convert=True)
    for param, grad in zip(params, run["grads"], strict=True):
        param.grad = grad
    mine.step()
    for param, theirs in zip(params, run["after"], strict=True):
        one_ulp = (
            {"rtol": 2.0**-7, "atol": 0} if param.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        )
        torch.testing.assert_close(param.detach(), theirs, **one_ulp)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("as_weight", [True, False])
def test_flashoptims_correction_of_weights_is_read(bits: int, as_weight: bool) -> None:
    """Weight + part of half a unit in its last place, in float64, also below powers of two, to our last bit."""
    gen = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(4000, generator=gen), 2.0 ** torch.arange(-20.0, 20.0), torch.zeros(8)])
    weight = nn.Parameter(values.bfloat16())
    dtype, most = (torch.int8, 127) if bits == 8 else (torch.int16, 32767)
    errors = torch.randint(-most, most + 1, weight.shape, generator=gen)
    # What lies below a power of two is nearer to it than half of its own unit.
    unit = 2.0 ** (torch.frexp(weight.detach().double())[1] - 8).double()
    power = weight.detach().double().abs() == 2.0 ** (torch.frexp(weight.detach().double())[1] - 1).double()
    errors[power & (errors * weight.detach().sign() < 0)] //= 2
    errors[weight.detach() == 0] = 0
    exact = weight.detach().double() + errors.double() / most * unit / 2
    stored = errors.to(dtype)
    if as_weight:
        stored = stored.bfloat16() if bits == 8 else stored.view(torch.bfloat16)
    state = {"exp_avg": torch.zeros(weight.shape), "error_bits": stored}
    group = {
        "lr": 0.1,
        "betas": (0.9, 0.99),
        "weight_decay": 0.0,
        "master_bytewidth": 2 + bits // 8,
        "params": [0],
    }
    mine = optim.Lion([("w", weight)], weights="split16", backend="reference")
    mine.load_state_dict({"state": {0: state}, "param_groups": [group]}, convert=True)
    found = mine.master_state_dict()["w"].double()
    assert ((found - exact).abs() <= unit * 2.0**-16).all()
