"""What `benchmarks.cpu` compares, and how a pair is timed inside one process.

A case builds a *pair*: two functions that take a step, or some, and return the seconds of one step. They are called in
turn, ours first in one round and the other first in the next, so that whatever the machine does besides falls on both.
"""

from __future__ import annotations

import importlib
import inspect
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import optwatch
import optwatch.optim
from optwatch.board import SUFFIX, BoardReader
from optwatch.kernels.cpu.library import LibraryError, library
from optwatch.optim import AdamW, StepStats

MEBI = 1 << 20
#: How often the full statistics are summed unless the user says otherwise.
EVERY: int = inspect.signature(optwatch.watch).parameters["every"].default

Timed = Callable[[], float]


@dataclass(frozen=True)
class Sizes:
    """Elements of the large tensors, and how often things are timed."""

    large: int = 64 * MEBI  # far larger than any cache
    peers: int = 16 * MEBI
    tensors: int = 1000
    rounds: int = 20  # timed rounds of a pair in one process
    slow_rounds: int = 6  # the same where a single call takes long
    watched_rounds: int = 12  # and where neighbours in time differ by as much as is sought


FULL = Sizes()
QUICK = Sizes(large=MEBI // 8, peers=MEBI // 8, tensors=50, rounds=2, slow_rounds=2, watched_rounds=2)


@dataclass
class Pair:
    """Two things to time in turn."""

    ours: Timed
    other: Timed
    rounds: int
    warm_up: int = 3  # rounds before, not timed
    notes: dict[str, list[float]] = field(default_factory=dict)  # what was measured besides


@dataclass(frozen=True)
class Case:
    """A row of the result."""

    name: str
    what: str
    against: str
    build: Callable[[Sizes, int], Pair]
    unit: str = "×"  # "×": ours / other; "× faster": other / ours; a name of Pair.notes: that
    target: float | None = None
    needs: str | None = None  # a package beyond our own
    narrow: float | None = None  # the target with AVX2, if it is another
    twice: bool = False  # measured with AVX2 also where there is something better

    def target_with(self, isa: str) -> float | None:
        """The target where ours has this instruction set; torch always has its best."""
        return self.narrow if isa == "avx2" and self.narrow is not None else self.target

    @property
    def more_is_better(self) -> bool:
        """Whether the target is a lower limit."""
        return self.unit == "× faster"


# --- optimizers -----------------------------------------------------------------------------------------------------


def parameters(numel: int, dtype: torch.dtype, count: int = 1) -> list[torch.nn.Parameter]:
    """Tensors that look like weights, with gradients that look like gradients."""
    gen = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        param = torch.nn.Parameter(torch.randn(numel, generator=gen).mul_(0.02).to(dtype))
        param.grad = torch.randn(numel, generator=gen).mul_(1e-3).to(dtype)
        made.append(param)
    return made


def our_own(
    state: str, numel: int, dtype: torch.dtype = torch.float32, count: int = 1
) -> torch.optim.Optimizer:
    """Ours; the backend is named so that a missing library is an error and not a slow figure."""
    return AdamW(parameters(numel, dtype, count), state=state, backend="cpu")


def torch_fused(numel: int, dtype: torch.dtype = torch.float32, count: int = 1) -> torch.optim.Optimizer:
    """What torch offers."""
    return torch.optim.AdamW(parameters(numel, dtype, count), fused=True)


class MasterByHand:
    """bf16 parameters with fp32 ones beside them that torch steps: gradients up, a fused step, weights down."""

    def __init__(self, numel: int) -> None:
        (self.seen,) = parameters(numel, torch.bfloat16)
        self.master = torch.nn.Parameter(self.seen.detach().float())
        self.master.grad = torch.empty_like(self.master)
        self.optimizer = torch.optim.AdamW([self.master], fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """The gradient's fp32 copy is kept from step to step: making one anew would take longer."""
        assert self.master.grad is not None
        assert self.seen.grad is not None
        self.master.grad.copy_(self.seen.grad)
        self.optimizer.step()
        self.seen.copy_(self.master)


def peer(package: str, numel: int) -> torch.optim.Optimizer:
    """The 8-bit AdamW of another package; torchao compiles its step in the first call."""
    made: torch.optim.Optimizer = importlib.import_module(f"{package}.optim").AdamW8bit(
        parameters(numel, torch.float32)
    )
    return made


# --- what is timed --------------------------------------------------------------------------------------------------


def stepping(optimizer: torch.optim.Optimizer | MasterByHand, steps: int = 1) -> Timed:
    """The mean of ``steps`` steps in a row."""

    def timed() -> float:
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.step()
        return (time.perf_counter() - started) / steps

    return timed


def with_full_statistics(optimizer: AdamW) -> Timed:
    """A step that sums the full statistics."""
    plain = stepping(optimizer)

    def timed() -> float:
        end = optimizer.subscribe(_ignore, every=1)
        try:
            return plain()
        finally:
            end()

    return timed


def _ignore(_: StepStats) -> None:
    """Hear of a step."""


def watched(optimizer: AdamW, steps: int, overheads: list[float]) -> Timed:
    """The mean of watched steps; notes the microseconds a step by watching's own account.

    Full statistics come once in `EVERY` steps, so a multiple of that has to be timed. Opening a board is no part of a
    step: two steps go by first.
    """
    plain, warm = stepping(optimizer, steps), stepping(optimizer, 2)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

    def timed() -> float:
        with tempfile.TemporaryDirectory(prefix="optwatch-benchmark-", dir=memory) as directory:
            with optwatch.watch(optimizer, directory=directory, agent=False):
                warm()
                before = overhead(Path(directory))
                seconds = plain()
                overheads.append(1e6 * (overhead(Path(directory)) - before) / steps)
            return seconds

    return timed


def overhead(directory: Path) -> float:
    """The seconds that watching has taken from the training loop, as its one board tells."""
    (path,) = directory.glob(f"*{SUFFIX}")
    reader = BoardReader(path)
    try:
        names = [series.name for series in reader.schema.counters]
        return float(reader.live().counters[names.index("optwatch.overhead")])
    finally:
        reader.close()


# --- the pairs ------------------------------------------------------------------------------------------------------


def in_turn(
    build_ours: Callable[[], Timed], build_other: Callable[[], Timed], rounds: int, process: int
) -> Pair:
    """A pair whose memory is laid out in one order in every second process, and in the other in the rest."""
    if process % 2:
        other = build_other()
        return Pair(build_ours(), other, rounds)
    return Pair(build_ours(), build_other(), rounds)


def large(state: str, dtype: torch.dtype = torch.float32) -> Callable[[Sizes, int], Pair]:
    """One large tensor, against torch."""

    def build(sizes: Sizes, process: int) -> Pair:
        return in_turn(
            lambda: stepping(our_own(state, sizes.large, dtype)),
            lambda: stepping(torch_fused(sizes.large, dtype)),
            sizes.rounds,
            process,
        )

    return build


def split8(sizes: Sizes, process: int) -> Pair:
    """One large bf16 tensor whose weight has 24 bits, against an fp32 master."""

    def ours() -> Timed:
        params = parameters(sizes.large, torch.bfloat16)
        return stepping(AdamW(params, state="int8", weights="split8", backend="cpu"))

    return in_turn(ours, lambda: stepping(MasterByHand(sizes.large)), sizes.rounds, process)


def full_statistics(sizes: Sizes, _: int) -> Pair:
    """The same optimizer on the same memory, with and without."""
    optimizer = our_own("int8", sizes.large)
    assert isinstance(optimizer, AdamW)
    return Pair(with_full_statistics(optimizer), stepping(optimizer), sizes.rounds)


def watching(sizes: Sizes, _: int) -> Pair:
    """The same optimizer on the same memory, watched as by default and not."""
    return watched_pair(our_own("int8", sizes.large), sizes)


def watching_many(sizes: Sizes, _: int) -> Pair:
    """300 tensors, large enough for 8-bit state."""
    return watched_pair(our_own("int8", 4096, count=300), sizes)


def watched_pair(optimizer: torch.optim.Optimizer, sizes: Sizes) -> Pair:
    """Watched and not, with the microseconds a step by watching's own account and by the clock."""
    assert isinstance(optimizer, AdamW)
    overheads: list[float] = []
    with_watch, without = watched(optimizer, EVERY, overheads), stepping(optimizer, EVERY)
    return Pair(with_watch, without, sizes.watched_rounds, warm_up=1, notes={"µs a step": overheads})


def peers(package: str) -> Callable[[Sizes, int], Pair]:
    """One tensor, against another package's 8-bit AdamW."""

    def build(sizes: Sizes, process: int) -> Pair:
        return in_turn(
            lambda: stepping(our_own("int8", sizes.peers)),
            lambda: stepping(peer(package, sizes.peers)),
            sizes.slow_rounds,
            process,
        )

    return build


def optimizer(name: str, state: str, **options: Any) -> Callable[[Sizes, int], Pair]:
    """One tensor, an optimizer of ours against torch's of the same name: fused where torch has that, else foreach."""
    theirs = getattr(torch.optim, name)
    path = {"fused": True} if "fused" in inspect.signature(theirs).parameters else {"foreach": True}

    def build(sizes: Sizes, process: int) -> Pair:
        def ours() -> Timed:
            made = getattr(optwatch.optim, name)
            return stepping(
                made(parameters(sizes.peers, torch.float32), state=state, backend="cpu", **options)
            )

        def other() -> Timed:
            return stepping(theirs(parameters(sizes.peers, torch.float32), **options, **path))

        return in_turn(ours, other, sizes.rounds, process)

    return build


def of_every_optimizer() -> Iterator[Case]:
    """A row for each optimizer that torch has, too, in fp32 and in int8: where it keeps nothing, in fp32 alone."""
    for name, key, options in OPTIMIZERS:
        shown = "".join(f", {option}={value}" for option, value in options.items())
        for state, target, narrow in (("fp32", 1.05, None), ("int8", 1.0, 1.6)):
            if key == STATELESS and state != "fp32":
                continue
            what = f'{name}(16 Mi fp32 parameters{shown}, state="{state}")'
            build = optimizer(name, state, **options)
            yield Case(f"{key}-{state}", what, f"torch.optim.{name}, fused or foreach", build,
                       target=target, narrow=narrow)  # fmt: skip


def many(state: str) -> Callable[[Sizes, int], Pair]:
    """1,000 tensors of 1,000 elements, against torch."""

    def build(sizes: Sizes, process: int) -> Pair:
        return in_turn(
            lambda: stepping(our_own(state, 1000, count=sizes.tensors), steps=10),
            lambda: stepping(torch_fused(1000, count=sizes.tensors), steps=10),
            sizes.slow_rounds,
            process,
        )

    return build


STATELESS = "sgd"
OPTIMIZERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Adam", "adam", {}),
    ("AdamW", "amsgrad", {"amsgrad": True}),
    ("SGD", "sgd", {"lr": 1e-3}),
    ("SGD", "sgd-momentum", {"lr": 1e-3, "momentum": 0.9}),
    ("RMSprop", "rmsprop", {}),
    ("Adagrad", "adagrad", {}),
    ("Adadelta", "adadelta", {}),
)

FUSED = "torch.optim.AdamW(fused=True)"
BY_HAND = "the same with an fp32 master by hand"
CASES = (
    Case("int8", '64 Mi fp32 parameters, state="int8"', FUSED, large("int8"), target=1.0, narrow=1.6,
         twice=True),
    Case("fp32", '64 Mi fp32 parameters, state="fp32"', FUSED, large("fp32"), target=1.05, twice=True),
    Case("bf16", '64 Mi fp32 parameters, state="bf16"', FUSED, large("bf16")),
    Case("bf16-parameters", '64 Mi bf16 parameters, state="int8"', FUSED, large("int8", torch.bfloat16)),
    Case("split8", '64 Mi bf16 parameters, state="int8", weights="split8"', BY_HAND, split8, target=1.0),
    Case("full", "64 Mi, int8: a step with full statistics", "a plain step", full_statistics, target=1.6,
         twice=True),
    Case("watched", f"64 Mi, int8: watched, full statistics every {EVERY} steps", "unwatched", watching, target=1.02),
    Case("bitsandbytes", '16 Mi fp32 parameters, state="int8"', "bitsandbytes.optim.AdamW8bit", peers("bitsandbytes"),
         unit="× faster", target=20, needs="bitsandbytes"),
    Case("torchao", '16 Mi fp32 parameters, state="int8"', "torchao.optim.AdamW8bit", peers("torchao"),
         unit="× faster", target=20, needs="torchao"),
    Case("many-int8", '1,000 tensors of 1,000, state="int8"', FUSED, many("int8"), target=0.25),
    Case("many-fp32", '1,000 tensors of 1,000, state="fp32"', FUSED, many("fp32"), target=0.25),
    Case("watched-300", "300 tensors: what watching takes, by its own account", "unwatched", watching_many,
         unit="µs a step"),
    *of_every_optimizer(),
)  # fmt: skip


# --- one process ----------------------------------------------------------------------------------------------------


def sample(case: Case, sizes: Sizes, process: int) -> dict[str, object]:
    """Time a case in this process: seconds a step of every round, and the figure they give."""
    loaded = library()
    if isinstance(loaded, LibraryError):
        raise SystemExit(f"there is nothing to measure: {loaded}")
    pair = case.build(sizes, process)
    times: dict[str, list[float]] = {"ours": [], "other": []}
    for number in range(-pair.warm_up, pair.rounds):
        turn = [("ours", pair.ours), ("other", pair.other)]
        for name, timed in turn if (number + process) % 2 else reversed(turn):
            seconds = timed()
            if number >= 0:
                times[name].append(seconds)
    notes = {name: values[-pair.rounds :] for name, values in pair.notes.items()}
    return {
        "isa": loaded.isa,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "copied": copied(sizes.peers),
        "figure": figure(case, times["ours"], times["other"], notes),
        **times,
        **notes,
    }


def copied(numel: int) -> float:
    """Bytes a second, read and written, at which this process copies memory: the same processor may offer several."""
    source, target = torch.ones(numel), torch.zeros(numel)
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / statistics.median(seconds)


def figure(case: Case, ours: list[float], other: list[float], notes: dict[str, list[float]]) -> float:
    """The median over the rounds: of a ratio of two neighbours in time, or of what was noted."""
    if case.unit in notes:
        return statistics.median(notes[case.unit])
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    return 1 / statistics.median(ratios) if case.more_is_better else statistics.median(ratios)
