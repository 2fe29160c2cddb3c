"""Optimizers that are not ours: their bytes to the byte, their moments to four digits, and no bit of them changed."""

from __future__ import annotations

import gc
import io
import math
import warnings
import weakref
import zipfile
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch
import torchao.optim
from torch import nn

import optwatch
from hooks import registries
from hooks.boards import published
from optwatch.hooks import foreign as foreign_module
from optwatch.hooks.adapters import ADAPTERS, UNKNOWN, adapter_for
from optwatch.hooks.chunks import CHUNK, chunk_sums
from optwatch.hooks.foreign import Foreign
from optwatch.hooks.members import Stepped
from optwatch.kernels.cpu import state, sums
from optwatch.kernels.cpu.library import LibraryError
from optwatch.metrics.fields import row_fields
from optwatch.optim.count import count_bytes, state_leaves, storages

pytestmark = pytest.mark.usefixtures("eager")


def saved_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the storages of the state take in a file, beside those of the parameters.

    torch.save finds each of them once, by its own ways; it also writes parameters that are keys of some dict.
    """

    def written(*values: object) -> int:
        file = io.BytesIO()
        torch.save(values, file)
        entries = zipfile.ZipFile(file).infolist()
        return sum(entry.file_size for entry in entries if "/data/" in entry.filename)

    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return written(params, list(optimizer.state.values())) - written(params)


def counted(optimizer: torch.optim.Optimizer) -> int:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    names = adapter_for(optimizer).slot_of(optimizer)
    return sum(count_bytes(state_leaves(optimizer.state), names, storages(params)).values())


def test_state_bytes_of_every_optimizer() -> None:
    """Every class of the five packages that runs on a CPU: the storages of its state, to the byte."""
    wrong = {}
    names = registries.names()
    for name in names:
        training = registries.Training(name)
        training.step()
        training.step()
        if counted(training.optimizer) != saved_bytes(training.optimizer):
            wrong[name] = counted(training.optimizer), saved_bytes(training.optimizer)
    assert not wrong
    assert len(names) > 180
    assert not [name for name in registries.LEFT_OUT if not _exists(name)], "no longer there: take it out"


def _exists(name: str) -> bool:
    package, _, short = name.rpartition(".")
    return hasattr(registries.PACKAGES[package], short)


class Holder:
    """Some object that has a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.again = tensor, self


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (lambda p: {"a": torch.zeros(10)[2:5]}, {"a float32": 40}),  # a view keeps its whole storage
        (lambda p: {"a": (big := torch.zeros(8)), "b": big[:4], "c": [big]}, {"a float32": 32}),
        (lambda p: {"step": 3, "rate": 0.5, "a": torch.tensor(2.0)}, {"a float32": 4}),  # numbers are no state
        (lambda p: {"a": p, "b": p.detach()[1:], "c": torch.zeros(2)}, {"c float32": 8}),  # the weight itself
        (
            lambda p: {"q": {"x": [Holder(torch.zeros(3)), None]}, "t": (torch.zeros(1, dtype=torch.int64),)},
            {"q float32": 12, "t int64": 8},
        ),
        (lambda p: {"m": torch.zeros(1000, device="meta")}, {"m float32": 4000}),
        (lambda p: {"s": torch.zeros(4, 4).to_sparse()}, {"s float32": 0, "s int64": 0}),
        (lambda p: {"n": torch.zeros(0), "o": torch.zeros(0)}, {"n float32": 0, "o float32": 0}),
    ],
    ids=["view", "shared", "numbers", "parameter", "nested", "meta", "sparse", "empty"],
)  # fmt: skip
def test_what_counts(state, expected) -> None:
    """Storages, each once, under the key they are found at first; not what belongs to the parameter."""
    param = nn.Parameter(torch.ones(50))
    found = count_bytes(state_leaves({param: state(param)}), {}, storages([param]))
    assert {f"{kind.slot} {kind.dtype}": number for kind, number in found.items()} == expected


#: Optimizers whose slots are read, with what they are expected to be kept as.
READ = {
    "torch.optim.AdamW": {"exp_avg": "float32", "exp_avg_sq": "float32"},
    "torch.optim.Adagrad": {"sum": "float32"},
    "torch.optim.SGD": {"momentum_buffer": "float32"},
    "torch.optim.RMSprop": {"square_avg": "float32"},
    "bitsandbytes.AdamW": {"exp_avg": "float32", "exp_avg_sq": "float32"},
    "bitsandbytes.AdamW8bit": {"exp_avg": "bitsandbytes 8-bit", "exp_avg_sq": "bitsandbytes 8-bit"},
    "bitsandbytes.Lion8bit": {"exp_avg": "bitsandbytes 8-bit"},
    "bitsandbytes.RMSprop8bit": {"square_avg": "bitsandbytes 8-bit"},
    "torchao.AdamW8bit": {"exp_avg": "torchao 8-bit", "exp_avg_sq": "torchao 8-bit"},
    "torchao.AdamW4bit": {"exp_avg": "torchao 4-bit", "exp_avg_sq": "torchao 4-bit"},
    "torchao.AdamWFp8": {"exp_avg": "torchao fp8", "exp_avg_sq": "torchao fp8"},
    "pytorch_optimizer.AdaBelief": {"exp_avg": "float32", "exp_avg_var": "float32"},
    # The second moment of a matrix is kept as rows and columns: only what all parameters have is a slot of the table.
    "transformers.Adafactor": {"exp_avg": "float32"},
}
#: What makes an optimizer keep them.
OPTIONS = {"transformers.Adafactor": {"beta1": 0.9}}


def test_every_adapter_is_read() -> None:
    """None is registered without a row; ours count what their kernels do in tests/kernels."""
    packages = {name.rpartition(".")[0] for name in READ}
    assert packages | {"optwatch"} == {adapter.name for adapter in ADAPTERS}


def reference(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> dict[str, torch.Tensor]:
    """The moments of ``param`` in float64, decoded by the package itself."""
    state = optimizer.state[param]
    names = adapter_for(optimizer).slot_of(optimizer)
    found = {}
    for key, stored in state.items():
        if not isinstance(stored, torch.Tensor) or stored.shape != param.shape:
            continue
        number = key.removeprefix("state")
        if stored.dtype == torch.uint8:
            values = bitsandbytes.functional.dequantize_blockwise(
                stored, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
            )
        else:
            values = stored if type(stored) is torch.Tensor else stored.dequantize()
        found[names.get(key, key)] = values.double()
    return found


@pytest.fixture(params=["compiled", "torch"])
def summed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who sums: the compiled library what it reads, or torch everything, as where there is no library."""
    if request.param == "torch":
        for module in (state, sums):
            monkeypatch.setattr(module, "library", lambda: LibraryError("hidden"))
    return str(request.param)


def test_the_library_reads_what_is_kept_in_fp32_bf16_or_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these nothing is left for torch; of torchao's 4-bit state everything."""
    chunked: list[str] = []

    def noted(stepped: Stepped) -> list[list[torch.Tensor]]:
        chunked.extend(slot.format for slot in stepped.slots)
        return chunk_sums(stepped)

    monkeypatch.setattr(foreign_module, "chunk_sums", noted)
    for name in READ:
        training = registries.Training(name, **OPTIONS.get(name, {}))
        training.step()
        Foreign(adapter_for(training.optimizer)).after(training.optimizer, 1, full=True)
    assert set(chunked) <= {"torchao 4-bit", "torchao fp8"}
    assert "torchao 4-bit" in chunked


@pytest.mark.usefixtures("summed")
@pytest.mark.parametrize("name", READ)
def test_statistics_equal_float64_sums(name: str) -> None:
    """Every field that can be had, to 1e-4, for every tensor, small ones with fp32 state included."""
    training = registries.Training(name, **OPTIONS.get(name, {}))
    optimizer = training.optimizer
    foreign = Foreign(adapter_for(optimizer))
    for step in (1, 2, 3):
        training.step()
        stats = foreign.after(optimizer, step, full=True)
    (plan,) = stats.plans
    slots = plan.layout.slots
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for row, index in zip(plan.rows.tolist(), plan.layout.indices, strict=True):
        fields = dict(zip(row_fields(slots), row, strict=True))
        param, moments = params[index], reference(optimizer, params[index])
        grad = param.grad.double()
        assert fields["grad_sq"] == pytest.approx(grad.square().sum().item(), rel=1e-4)
        assert fields["weight_sq"] == pytest.approx(param.double().square().sum().item(), rel=1e-4)
        assert fields["nonfinite"] == 0
        for slot, second in zip(slots, plan.layout.second_moments, strict=True):
            x = moments[slot]
            exact = x.sum() if second else x.square().sum()
            size = x.abs().sum().item()
            assert fields[f"{slot}.exact_sq"] == pytest.approx(exact.item(), rel=1e-4)
            assert fields[f"{slot}.sum"] == pytest.approx(x.sum().item(), rel=1e-4, abs=1e-4 * size)
            assert fields[f"{slot}.absmax"] == pytest.approx(x.abs().max().item(), rel=1e-5)
        if not plan.layout.second_moments[0]:
            product = moments[slots[0]] * grad
            assert fields["moment_grad"] == pytest.approx(
                product.sum().item(), rel=1e-4, abs=1e-4 * product.abs().sum().item()
            )
    assert set(plan.layout.codecs) <= {*READ[name].values(), "float32"}
    assert dict.fromkeys(slots) == dict.fromkeys(READ[name])


@pytest.mark.usefixtures("summed")
def test_chunks_views_and_types() -> None:
    """A tensor of several chunks, a transposed one, a bf16 one and a channels_last one give the same sums."""
    torch.manual_seed(0)
    params = [
        nn.Parameter(torch.randn(3 * CHUNK + 17)),
        nn.Parameter(torch.randn(70, 90).t()),
        nn.Parameter(torch.randn(500).bfloat16()),
        nn.Parameter(torch.randn(4, 8, 5, 5).to(memory_format=torch.channels_last)),
    ]
    optimizer = torch.optim.Adam(params, lr=0.1)
    foreign = Foreign(adapter_for(optimizer))
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    rows = {}
    for full in (True, False):
        stats = foreign.after(optimizer, 1, full)
        for plan in stats.plans:
            rows[full] = np.array([plan.rows[plan.layout.indices.index(i)].tolist() for i in range(4)])
    names = row_fields(("exp_avg", "exp_avg_sq"))
    for i, param in enumerate(params):
        m, grad = optimizer.state[param]["exp_avg"].double(), param.grad.double()
        found = dict(zip(names, rows[True][i], strict=True))
        assert rows[False][i, 0] == pytest.approx(grad.square().sum().item(), rel=1e-5)
        assert found["grad_sq"] == pytest.approx(grad.square().sum().item(), rel=1e-5)
        assert found["exp_avg.exact_sq"] == pytest.approx(m.square().sum().item(), rel=1e-5)
        assert found["moment_grad"] == pytest.approx((m * grad).sum().item(), rel=1e-5)


@pytest.mark.usefixtures("summed")
def test_the_update_follows_from_fp32_state() -> None:
    """Where the rule is known, the norm of the update is that of the difference of the weights."""
    for kind, options in (
        (torch.optim.AdamW, {"weight_decay": 0.0}),
        (torch.optim.Adam, {}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
        (torch.optim.Adagrad, {}),
        (torch.optim.Adadelta, {}),
        (bitsandbytes.optim.AdamW32bit, {"weight_decay": 0.0}),
    ):
        torch.manual_seed(1)
        param = nn.Parameter(torch.zeros(5000))
        optimizer = kind([param], lr=0.1, **options)
        foreign = Foreign(adapter_for(optimizer))
        for step in (1, 2, 3):
            old = param.detach().clone()
            param.grad = torch.randn(5000)
            optimizer.step()
            stats = foreign.after(optimizer, step, full=True)
            difference = (old.double() - param.double()).square().sum().item()
            assert stats.plans[0].rows[0, 2].item() == pytest.approx(difference, rel=1e-4), kind
        assert foreign.sampled == ("update_sq",)


@pytest.mark.usefixtures("summed")
def test_nonfinite_gradients_are_counted(directory: Path) -> None:
    """In every step, sampled or not."""
    param = nn.Parameter(torch.ones(100))
    optimizer = torch.optim.AdamW([param])
    with optwatch.watch(optimizer, directory=directory, agent=False):
        for bad in (0, 3, 0, 2):
            param.grad = torch.ones(100)
            param.grad[:bad] = math.inf if bad == 2 else math.nan
            optimizer.step()
        assert published(directory).counters["nonfinite_elements", "AdamW"] == 5


def test_bytes_follow_every_step(directory: Path) -> None:
    """State that grows between sampled steps is seen in the step in which it does."""
    param = nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.AdamW([param])
    with optwatch.watch(optimizer, directory=directory, agent=False, every=50):
        for step in range(4):
            if step == 2:
                optimizer.state[param]["more"] = torch.zeros(7)
            param.grad = torch.ones(1000)
            optimizer.step()
            found = published(directory).gauges
            state = sum(value for key, value in found.items() if key[0] == "optimizer.state")
            assert state == saved_bytes(optimizer)


@pytest.mark.parametrize(
    "name", ["torch.optim.AdamW", "bitsandbytes.AdamW8bit", "torchao.AdamW8bit", "transformers.Adafactor"]
)
def test_watching_changes_no_bit(directory: Path, name: str) -> None:
    """Fully watched, with a shadow, and not at all: equal weights."""
    weights = []
    for watched in (True, False):
        training = registries.Training(name)
        watch = None
        if watched:
            watch = optwatch.watch(
                training.optimizer, every=3, shadow=0.5, what_if="int4", directory=directory, agent=False
            )
        torch.manual_seed(5)
        for _ in range(12):
            training.step()
        if watch is not None:
            assert published(directory).counters["adapter_errors", name.rpartition(".")[2]] == 0
            watch.close()
        weights.append([p.detach().clone() for p in training.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_nothing_is_kept_alive(directory: Path) -> None:
    """Neither state nor parameters nor the optimizer, with a shadow of it."""
    training = registries.Training("bitsandbytes.AdamW8bit")
    watch = optwatch.watch(training.optimizer, every=2, shadow=0.5, directory=directory, agent=False)
    for _ in range(3):
        training.step()
    param = next(training.model.parameters())
    gone = [weakref.ref(t) for t in (param, training.optimizer, training.optimizer.state[param]["state1"])]
    del training, param
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    watch.close()


@pytest.mark.parametrize("late", [True, False], ids=["after a step", "from the first"])
@pytest.mark.parametrize("method", ["knows", "slot_of", "slots", "math"])
def test_an_error_in_an_adapter_ends_its_statistics_only(
    directory: Path, monkeypatch: pytest.MonkeyPatch, method: str, late: bool
) -> None:
    """Counted, said once; bytes, durations and the other optimizer go on."""
    one, two = registries.Training("torch.optim.AdamW"), registries.Training("bitsandbytes.Lion8bit")
    adapter = adapter_for(one.optimizer)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("on purpose")

    def step() -> None:
        for training in (one, two):
            training.optimizer.zero_grad()
            training.model(torch.randn(4, 64)).square().mean().backward()
            training.optimizer.step()

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if not late:
            monkeypatch.setattr(adapter, method, fail)
        watch = optwatch.watch([one.optimizer, two.optimizer], every=1, directory=directory, agent=False)
        step()
        if late:
            monkeypatch.setattr(adapter, method, fail)
        for _ in range(3):
            step()
    needed = not late or method in ("slots", "math")  # the others are asked once, at the beginning
    found = published(directory)
    ours = [str(one.message) for one in said if issubclass(one.category, RuntimeWarning)]
    assert len(ours) == len(set(ours))
    assert bool(ours) is needed
    assert all("the adapter for torch.optim raised ZeroDivisionError: on purpose" in text for text in ours)
    assert found.counters["adapter_errors", "AdamW"] == len(ours)
    assert found.counters["adapter_errors", "Lion8bit"] == 0
    assert found.counters["steps", "AdamW"] == found.counters["steps", "Lion8bit"] == 4
    assert any(key[:2] == ("optimizer.state", "AdamW") for key in found.gauges)
    whole = [table.optimizer for table in found.reader.schema.tables if table.family == "step"]
    lost = needed and method in ("slots", "math")
    assert whole == (["Lion8bit"] if lost else ["AdamW", "Lion8bit"])
    watch.close()


def test_an_unknown_optimizer_has_bytes_norms_and_durations(directory: Path) -> None:
    """One of one's own, with state of its own."""

    class Mine(torch.optim.Optimizer):
        def __init__(self, params) -> None:
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure=None) -> None:
            for param in self.param_groups[0]["params"]:
                self.state[param]["trace"] = param.grad.clone()
                param.sub_(0.1 * param.grad)

    model = nn.Linear(10, 10)
    optimizer = Mine(model.parameters())
    assert adapter_for(optimizer) is UNKNOWN
    with optwatch.watch(optimizer, model=model, every=1, directory=directory, agent=False):
        model(torch.ones(10)).sum().backward()
        optimizer.step()
        found = published(directory)
        assert found.gauges["optimizer.state", "Mine", "trace", "float32", "cpu"] == 440
        (table,) = found.records[-1].tables[:1]
        expected = [p.grad.square().sum().item() for p in model.parameters()]
        assert table[:, 0].tolist() == pytest.approx(expected)


def test_adapters_are_found() -> None:
    """Each package by its own; a class derived from one of torch's is read like it."""

    class Derived(torch.optim.AdamW):
        pass

    param = nn.Parameter(torch.ones(3))
    assert adapter_for(Derived([param])).name == "torch.optim"
    assert adapter_for(torchao.optim.AdamW8bit([param])).name == "torchao"
    assert adapter_for(bitsandbytes.optim.AdamW8bit([param])).name == "bitsandbytes"
    assert len({adapter.name for adapter in ADAPTERS}) == len(ADAPTERS) == 6


def test_the_loop_that_a_scaler_and_accumulation_make(directory: Path) -> None:
    """Steps that the scaler leaves out count as skipped; several backward passes are one step."""
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with optwatch.watch(optimizer, every=1, directory=directory, agent=False):
        for step in range(4):
            optimizer.zero_grad()
            for _ in range(2):
                loss = model(torch.ones(8)).sum() * (math.inf if step == 2 else 1.0)
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        found = published(directory)
    assert found.counters["steps", "AdamW"] == 3
    assert found.counters["steps_skipped", "AdamW"] == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in tracing
def test_under_torch_compile(directory: Path) -> None:
    """A compiled model and a compiled step: the same weights, and every step counted."""
    torch.compiler.set_stance("default")
    weights = []
    for watched in (True, False):
        training = registries.Training("torch.optim.SGD")
        step = torch.compile(training.optimizer.step, backend="eager")
        model = torch.compile(training.model, backend="eager")
        if watched:
            watch = optwatch.watch(training.optimizer, every=2, directory=directory, agent=False)
        torch.manual_seed(3)
        for _ in range(4):
            training.optimizer.zero_grad()
            model(torch.randn(4, 64)).square().mean().backward()
            step()
        if watched:
            assert published(directory).counters["steps", "SGD"] == 4
            watch.close()
        weights.append([p.detach().clone() for p in training.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
