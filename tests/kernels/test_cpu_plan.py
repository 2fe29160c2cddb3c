"""The CPU kernels against themselves: instruction sets, threads, layouts and processes must not matter."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from optwatch.codecs import FORMATS, WEIGHTS
from optwatch.kernels import PlanSpec, PlanTensor, random
from optwatch.kernels.cpu import CpuPlan
from optwatch.kernels.cpu.library import ISA_VARIABLE, PATH, Library, library
from optwatch.metrics.fields import CHEAP_FIELDS, row_fields
from optwatch.rules import RULES
from tests.codecs.samples import every_upper_half
from tests.kernels.agreement import check_weight_stores, formats

pytestmark = pytest.mark.skipif(
    not PATH.exists(), reason="built without a compiler: there is no library to test"
)

RULE = RULES["adamw"]
#: Below, at and beyond vectors, blocks and work items, and nothing at all.
SIZES = (0, 1, 31, 128, 513, 4097, 70_000)
KINDS = ("ordinary", "zero", "tiny", "huge", "nan")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Leave torch's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Run:
    """Some tensors stepped a few times from a fixed seed, and everything that can be compared."""

    def __init__(self, state: str, dtype: torch.dtype = torch.float32, isa: str | None = None) -> None:
        loaded = library()
        assert isinstance(loaded, Library), loaded
        self.codecs = tuple(FORMATS[state][slot.kind] for slot in RULE.slots)
        generator = torch.Generator().manual_seed(1)
        cpu = torch.device("cpu")
        self.tensors = [
            PlanTensor(
                torch.randn(n, generator=generator).to(dtype), tuple(c.allocate(n, cpu) for c in self.codecs)
            )
            for n in SIZES
        ]
        self.dtype = dtype
        self.rows: list[Tensor] = []
        self.plan = CpuPlan(loaded, PlanSpec(RULE, self.codecs, dtype, dtype), self.tensors)
        if isa is not None:
            os.environ[ISA_VARIABLE] = isa
            try:
                self.plan = CpuPlan(Library(), self.plan.spec, self.tensors)
            finally:
                del os.environ[ISA_VARIABLE]

    def prepared(self, kind: str, full: bool = True, steps: int = 3) -> Callable[[int], Tensor]:
        """Everything that ``steps`` steps need, made now; takes step 1, 2, ... when it is called."""
        generator = torch.Generator().manual_seed(2)
        n = len(SIZES)
        options = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1, "maximize": 0.0}
        arrays = {name: np.full(n, value) for name, value in options.items()}
        arrays["betas"] = np.tile([0.9, 0.999], (n, 1))
        ready = []
        for step in range(1, steps + 1):
            grads = [gradient(kind, size, generator).to(self.dtype) for size in SIZES]
            at = np.full(n, float(step))
            keys = random.keys(
                np.zeros(n, np.uint64), np.arange(n, dtype=np.uint64), len(self.codecs) + 1, at
            )
            ready.append((grads, RULE.prepare(arrays, at), keys))
        return lambda step: self.plan.run(*ready[step - 1], full)

    def step(self, kind: str, full: bool, steps: int = 3) -> Run:
        """Take steps and keep their rows."""
        take = self.prepared(kind, full, steps)
        self.rows += [take(step).clone() for step in range(1, steps + 1)]
        return self

    def storage(self) -> list[Tensor]:
        """Every bit that a step leaves behind, as bytes."""
        kept = [tensor.param for tensor in self.tensors]
        kept += [buffer for tensor in self.tensors for slot in tensor.slots for buffer in slot.values()]
        return [tensor.view(torch.uint8) for tensor in kept]

    def decoded(self) -> list[Tensor]:
        return [c.load(s) for tensor in self.tensors for c, s in zip(self.codecs, tensor.slots, strict=True)]


def gradient(kind: str, size: int, generator: torch.Generator) -> Tensor:
    grad = torch.randn(size, generator=generator)
    grad *= {"zero": 0.0, "tiny": 1e-30, "huge": 1e30}.get(kind, 1.0)
    if kind == "nan" and size:
        grad[size // 2] = torch.nan
    return grad


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", formats("cpu"))
def test_full_statistics_change_no_bit(state: str, dtype: torch.dtype, kind: str) -> None:
    """Watching is free of consequences, and the cheap sums are the same."""
    plain, full = Run(state, dtype).step(kind, full=False), Run(state, dtype).step(kind, full=True)
    assert same_bits(plain.storage(), full.storage())
    cheap = len(CHEAP_FIELDS)
    for a, b in zip(plain.rows, full.rows, strict=True):
        torch.testing.assert_close(a[:, :cheap], b[:, :cheap], rtol=1e-6, atol=0, equal_nan=True)
        assert not a[:, cheap:].any()


@pytest.mark.parametrize("state", formats("cpu"))
def test_the_number_of_threads_changes_no_bit(state: str) -> None:
    """Neither of the state nor of the sums, however the items fall to the threads."""
    runs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        runs.append(Run(state).step("ordinary", full=True))
    for run in runs[1:]:
        assert same_bits(runs[0].storage(), run.storage())
        assert same_bits(runs[0].rows, run.rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", formats("cpu"))
def test_instruction_sets_agree(state: str, kind: str) -> None:
    """One step of each against the best: weights and scales to the last bits, codes but for a rounding now and then."""
    best = Run(state).step(kind, full=True, steps=1)
    for isa in Library().isas[1:]:
        other = Run(state, isa=isa).step(kind, full=True, steps=1)
        for a, b in zip(best.tensors, other.tensors, strict=True):
            torch.testing.assert_close(a.param, b.param, rtol=1e-6, atol=1e-9, equal_nan=True)
            for codec, mine, theirs in zip(best.codecs, a.slots, b.slots, strict=True):
                codes, *scales = (buffer.name for buffer in codec.buffers)
                x, y = mine[codes].view(torch.uint8), theirs[codes].view(torch.uint8)
                assert (x != y).sum() <= max(1, 1e-3 * x.numel())
                for name in scales:
                    torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=0, equal_nan=True)
        finite = [
            torch.equal(a.isnan(), b.isnan()) for a, b in zip(best.decoded(), other.decoded(), strict=True)
        ]
        assert all(finite)


@pytest.mark.parametrize("kind", ["ordinary", "tiny", "huge"])
def test_sums_hold_over_the_whole_range_of_fp32(kind: str) -> None:
    """Squares of 1e-30 and 1e30 leave fp32; the sums do not lose them."""
    run = Run("fp32").step(kind, full=True, steps=1)
    names = row_fields([slot.name for slot in RULE.slots])
    generator = torch.Generator().manual_seed(2)
    for size, tensor, row in zip(SIZES, run.tensors, run.rows[0], strict=True):
        grad = gradient(kind, size, generator).double()
        moment = tensor.slots[0]["values"].double()
        got = dict(zip(names, row.tolist(), strict=True))
        want = {
            "grad_sq": grad.square().sum(),
            "weight_sq": tensor.param.double().square().sum(),
            "exp_avg.exact_sq": moment.square().sum(),
            "exp_avg.absmax": moment.abs().max() if size else 0.0,
            "moment_grad": (moment * grad).sum(),
        }
        for name, value in want.items():
            assert got[name] == pytest.approx(float(value), rel=1e-4, abs=0), (size, name)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_weight_is_stored_as_the_reference_does(weights: str) -> None:
    """Every upper half of an fp32 number, by every instruction set."""
    for isa in Library().isas:
        loaded = Library()
        loaded.isa = isa
        check_weight_stores(lambda s, t, loaded=loaded: CpuPlan(loaded, s, [t]), weights, every_upper_half())


def test_a_tensor_without_gradient_is_left_alone() -> None:
    """Nothing of it changes, its row is zero, and its neighbours step as ever."""
    alone, all_of_them = Run("int8"), Run("int8")
    untouched = [t.clone() for t in alone.storage()]
    options = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.0, "maximize": 0.0}
    arrays = {name: np.full(len(SIZES), value) for name, value in options.items()}
    arrays["betas"] = np.tile([0.9, 0.999], (len(SIZES), 1))
    scalars = RULE.prepare(arrays, np.ones(len(SIZES)))
    keys = np.ones((len(SIZES), 3, 2), np.uint32)
    grads = [torch.ones(n) for n in SIZES]
    skipped: list[Tensor | None] = [None, *grads[1:-1], None]
    rows = alone.plan.run(skipped, scalars, keys, full=True)
    expected = all_of_them.plan.run(list(grads), scalars, keys, full=True)
    assert not rows[-1].any()
    assert torch.equal(rows[:-1], expected[:-1])
    assert torch.equal(alone.storage()[len(SIZES) - 1], untouched[len(SIZES) - 1])
    assert same_bits(alone.storage()[: len(SIZES) - 1], all_of_them.storage()[: len(SIZES) - 1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="platform: no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_steps_on_its_own_thread() -> None:
    """The parent's threads are not there any more: waiting for them would hang."""
    torch.set_num_threads(2)
    expected, run = Run("int8").step("ordinary", full=True), Run("int8")
    step = run.prepared("ordinary")  # by the parent: torch itself hangs in a child, on tensors of this size
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a hang becomes a failure
        step(1)
        step(2)
        step(3)
        same = all(
            bytes(a.numpy()) == bytes(b.numpy())
            for a, b in zip(run.storage(), expected.storage(), strict=True)
        )
        os._exit(0 if same else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_bad_shapes_and_buffers_are_refused() -> None:
    """What was given, what was expected."""
    run = Run("int8")
    with pytest.raises(ValueError, match="expected 7 gradients"):
        run.plan.run([None], np.zeros((1, 8), np.float32), np.zeros((1, 3, 2), np.uint32), full=False)
    wrong = PlanTensor(torch.zeros(8), run.tensors[4].slots)
    with pytest.raises(ValueError, match="has 513 values, expected 8"):
        CpuPlan(run.plan._library, run.plan.spec, [wrong])
    with pytest.raises(ValueError, match="contiguous"):
        CpuPlan(run.plan._library, run.plan.spec, [PlanTensor(torch.zeros(16)[::2], run.tensors[4].slots)])
