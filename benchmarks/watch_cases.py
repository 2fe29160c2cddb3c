"""What `benchmarks.watch` compares: who watches which optimizer, and how the time of that is taken in one process.

Blocks of watched and of unwatched steps take turns in one process, on the same model. Clocks are read in each step:
before and after the hooks in front of ``step()``, and before and after those behind it, by hooks of the benchmark's
own that were registered first and last; and around the whole step of training. One in `BLOCK` steps is a sampled one,
so that both kinds are seen in a short time; a figure weighs them as one in `EVERY`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import optwatch
from benchmarks.watch_counts import counted
from optwatch.cli.demo.model import corpus, make_model, next_byte_loss, random_batch

#: How often the full statistics are summed unless the user says otherwise.
EVERY: int = inspect.signature(optwatch.watch).parameters["every"].default
BLOCK = 10
#: Depth, width, tokens and positions of GPT-2 small.
LAYERS, WIDTH, TOKENS, POSITIONS = 12, 768, 50257, 1024

Params = list[torch.nn.Parameter]


@dataclass(frozen=True)
class Sizes:
    """How much is trained, and how often it is timed."""

    shrink: int = 1  # divides the width of the large model
    rows: int = 32  # of a batch
    length: int = 128  # tokens of a row
    blocks: int = 1  # of `BLOCK` steps, in each turn
    rounds: int = 2  # turns of watched and unwatched
    step_rounds: int = 15  # the same where a step is the optimizer's alone: it is short, and its time wanders


FULL = Sizes()
QUICK = Sizes(shrink=32, rows=1, length=16, blocks=1, rounds=1, step_rounds=1)


@dataclass(frozen=True)
class Case:
    """A row of the result."""

    name: str
    what: str
    optimizer: Callable[[Params], torch.optim.Optimizer]
    by: str = "optwatch"  # who watches
    of: str = "training"  # what the figure is a share of: a step of "training", or of the "optimizer"
    target: float | None = None
    needs: str | None = None  # a package beyond our own


# --- what is trained ------------------------------------------------------------------------------------------------


class Training:
    """A GPT-2 of 4.8 million parameters on 4,096 bytes of text a step: forward, backward, step.

    As many tokens as the smallest batches of fine-tuning have. What watching costs does not depend on it, what a step
    of training takes does: with fewer, the step of any optimizer would be a sizeable part of it.
    """

    def __init__(self, build: Callable[[Params], torch.optim.Optimizer], sizes: Sizes) -> None:
        torch.manual_seed(0)
        self._sizes = sizes
        self._device = torch.device("cpu")
        self.model = make_model(self._device)
        self.optimizer = build(list(self.model.parameters()))
        self._data, self._random = corpus(), torch.Generator().manual_seed(0)

    def step(self) -> None:
        """One step."""
        self.optimizer.zero_grad()
        batch = random_batch(self._data, self._sizes.rows, self._random, self._device)
        next_byte_loss(self.model, batch[:, : self._sizes.length]).backward()
        self.optimizer.step()


class Stepping:
    """The step alone, on tensors of the shapes of GPT-2 small: 124 million parameters with gradients that stay."""

    def __init__(self, build: Callable[[Params], torch.optim.Optimizer], sizes: Sizes) -> None:
        random = torch.Generator().manual_seed(0)
        self.model = torch.nn.Module()
        for number, shape in enumerate(shapes(WIDTH // sizes.shrink, TOKENS // sizes.shrink)):
            param = torch.nn.Parameter(torch.randn(shape, generator=random).mul_(0.02))
            param.grad = torch.randn(shape, generator=random).mul_(1e-3)
            self.model.register_parameter(f"p{number}", param)
        self.optimizer = build(list(self.model.parameters()))

    def step(self) -> None:
        """One step."""
        self.optimizer.step()


def shapes(width: int, tokens: int) -> Iterator[tuple[int, ...]]:
    """The tensors of a GPT-2."""
    yield from ((tokens, width), (POSITIONS, width))
    for _ in range(LAYERS):
        for inputs, outputs in ((1, 3), (1, 1), (1, 4), (4, 1)):  # attention in and out, up and down
            yield from ((inputs * width, outputs * width), (outputs * width,))
        yield from ((width,),) * 4  # two norms
    yield from ((width,),) * 2


# --- who watches ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def by_optwatch(scene: Training | Stepping, every: int) -> Iterator[None]:
    """As by default, but for the interval."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="optwatch-benchmark-", dir=memory) as directory,
        optwatch.watch(scene.optimizer, scene.model, every=every, directory=directory, agent=False),
    ):
        yield


@contextlib.contextmanager
def by_composers_arithmetic(scene: Training | Stepping, every: int) -> Iterator[None]:
    """What Composer's OptimizerMonitor computes of an AdamW, as its documentation lists it; not the package.

    Norms of gradient, first moment, weight, root of the second moment and update, two cosines and two ratios, of each
    tensor; each becomes a number on the host, as loggers want it.
    """
    steps = 0

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        nonlocal steps
        steps += 1
        if steps % every:
            return
        found: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for name, param in scene.model.named_parameters():
                if param.grad is not None:
                    one = of_one_tensor(param, optimizer.state[param], optimizer.param_groups[0])
                    found |= {f"{metric}/{name}": value for metric, value in one.items()}
            squares = [norm.square() for name, norm in found.items() if name.startswith("l2_norm/grad/")]
            found["l2_norm/grad/global"] = torch.stack(squares).sum().sqrt()
        _ = {name: value.item() for name, value in found.items()}

    handle = scene.optimizer.register_step_post_hook(look)
    try:
        yield
    finally:
        handle.remove()


def of_one_tensor(
    param: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The figures of one tensor."""
    assert param.grad is not None
    grad, m, v, step = param.grad, state["exp_avg"], state["exp_avg_sq"], state["step"].item()
    first, second = group["betas"]
    root = (v / (1 - second**step)).sqrt_().add_(group["eps"])
    update = (
        (m / root)
        .mul_(group["lr"] / (1 - first**step))
        .add_(param, alpha=group["lr"] * group["weight_decay"])
    )
    norm, cosine = torch.linalg.vector_norm, torch.nn.functional.cosine_similarity
    found = {
        "l2_norm/grad": norm(grad),
        "l2_norm/moment": norm(m),
        "l2_norm/param": norm(param),
        "l2_norm/second_moment_sqrt": norm(v.sqrt()),
        "l2_norm/update": norm(update),
        "cosine/moment_grad": cosine(grad.flatten(), m.flatten(), dim=0),
        "cosine/update_grad": cosine(grad.flatten(), update.flatten(), dim=0),
    }  # fmt: skip
    found["l2_norm_ratio/moment_grad"] = found["l2_norm/grad"] / found["l2_norm/moment"]
    found["l2_norm_ratio/update_param"] = found["l2_norm/update"] / found["l2_norm/param"]
    return found


@contextlib.contextmanager
def by_wandb(scene: Training | Stepping, every: int) -> Iterator[None]:
    """W&B's ``watch`` of gradients and weights, offline, with a ``log`` a step."""
    wandb = importlib.import_module("wandb")
    with tempfile.TemporaryDirectory(prefix="optwatch-benchmark-") as directory:
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        with wandb.init(mode="offline", dir=directory, project="watch", settings=settings) as run:
            run.watch(scene.model, log="all", log_freq=every)
            handle = scene.optimizer.register_step_post_hook(lambda *_: run.log({"loss": 0.0}))
            try:
                yield
            finally:
                handle.remove()
                run.unwatch(scene.model)


#: The remainder by `BLOCK` of the steps in which more is looked at.
SAMPLED = {"optwatch": 1, "composer": 0, "wandb": 0}
WATCHERS = {"optwatch": by_optwatch, "composer": by_composers_arithmetic, "wandb": by_wandb}


def counts_itself(optimizer: torch.optim.Optimizer) -> int:
    """The steps that one of ours has taken, by which it chooses those with full statistics; 0 for all others."""
    own = isinstance(optimizer, optwatch.optim.Optimizer)
    return int(next(iter(optimizer.state.values()))["step"]) if own else 0


def is_sampled(scene: Training | Stepping, by: str, step: int) -> bool:
    """Whether the newest step, from 1, was one of every `BLOCK` in which more is looked at."""
    return (counts_itself(scene.optimizer) or step) % BLOCK == SAMPLED[by]


def steps_until(scene: Training | Stepping, by: str, kind: str) -> int:
    """How many watched steps there have to be for the last one to be of this kind, and not the first."""
    remainder = SAMPLED[by] + (5 if kind == "usual" else 0)
    return (remainder - counts_itself(scene.optimizer)) % BLOCK + BLOCK


# --- one process ----------------------------------------------------------------------------------------------------


class Clock:
    """Reads the time around the hooks that are registered between `first` and `last`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._read = optimizer, [0.0] * 4
        self._handles = [self._before(0), self._after(2)]

    def last(self) -> None:
        """All others have registered theirs."""
        self._handles += [self._before(1), self._after(3)]

    def stop(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def times(self) -> tuple[float, float]:
        """Of the newest step: the seconds in hooks, and those in the step itself."""
        a, b, c, d = self._read
        return (b - a) + (d - c), c - b

    def _before(self, place: int) -> Any:
        return self._optimizer.register_step_pre_hook(lambda *_: self._mark(place))

    def _after(self, place: int) -> Any:
        return self._optimizer.register_step_post_hook(lambda *_: self._mark(place))

    def _mark(self, place: int) -> None:
        self._read[place] = time.perf_counter()


def block(
    scene: Training | Stepping, by: str | None, sizes: Sizes, into: dict[str, list[list[float]]]
) -> None:
    """Time a turn: of each step the seconds in hooks, in ``step()``, and of all of it. The first step is left out."""
    clock = Clock(scene.optimizer)
    with WATCHERS[by](scene, BLOCK) if by else contextlib.nullcontext():
        clock.last()
        for step in range(1, sizes.blocks * BLOCK + 2):
            started = time.perf_counter()
            scene.step()
            whole = time.perf_counter() - started
            if step > 1:
                kind = "plain" if by is None else "sampled" if is_sampled(scene, by, step) else "usual"
                into[kind].append([*clock.times(), whole])
    clock.stop()


def sample(case: Case, sizes: Sizes, process: int) -> dict[str, Any]:
    """Time a case in this process."""
    scene = (Stepping if case.of == "optimizer" else Training)(case.optimizer, sizes)
    for _ in range(2):
        scene.step()
    times: dict[str, list[list[float]]] = {"plain": [], "usual": [], "sampled": []}
    for number in range(sizes.step_rounds if case.of == "optimizer" else sizes.rounds):
        turn = [None, case.by]
        for by in turn if (number + process) % 2 else reversed(turn):
            block(scene, by, sizes, times)
    # Afterwards, since a compiled step is then not compiled any more.
    torch.compiler.set_stance("force_eager")
    counts = {} if case.of == "optimizer" else {
        kind: counted(scene, lambda: WATCHERS[case.by](scene, BLOCK), steps_until(scene, case.by, kind))
        for kind in ("usual", "sampled")
    }  # fmt: skip
    return {
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        **figures(case, times),
        "counts": counts,
        "times": {kind: [[row[i] for row in rows] for i in range(3)] for kind, rows in times.items()},
    }


def figures(case: Case, times: dict[str, list[list[float]]]) -> dict[str, float]:
    """Medians, in microseconds, and the share of a step that watching takes on average, once in `EVERY` sampled."""
    hooks, step, whole = (
        {kind: 1e6 * statistics.median(row[i] for row in rows) for kind, rows in times.items()}
        for i in range(3)
    )

    def more(clock: dict[str, float], kind: str) -> float:
        return clock[kind] - clock["plain"]

    def added(kind: str) -> float:
        if case.by == "wandb":  # its hooks are in the model
            return more(whole, kind)
        # In the steps of others nothing is done; the difference of their times would be noise.
        inside = more(step, kind) if case.name.startswith("own") else 0.0
        return more(hooks, kind) + inside

    average = ((EVERY - 1) * added("usual") + added("sampled")) / EVERY
    return {
        "figure": average / whole["plain"],
        "usual_us": added("usual"),
        "sampled_us": added("sampled"),
        "average_us": average,
        "step_us": step["plain"],
        "whole_us": whole["plain"],
    }


# --- the cases ------------------------------------------------------------------------------------------------------


def of_package(package: str, name: str, **options: Any) -> Callable[[Params], torch.optim.Optimizer]:
    """An optimizer of another package, which is loaded where it is needed."""

    def build(params: Params) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = getattr(importlib.import_module(package), name)(params, **options)
        return made

    return build


def own(params: Params) -> torch.optim.Optimizer:
    """Ours; the backend is named so that a missing library is an error and not another figure."""
    return optwatch.optim.AdamW(params, lr=1e-4, state="int8", backend="cpu")


OWN = 'optwatch AdamW, state="int8"'
FUSED = of_package("torch.optim", "AdamW", lr=1e-4, fused=True)
ADAFACTOR = of_package(
    "transformers.optimization", "Adafactor", lr=1e-4, relative_step=False, scale_parameter=False
)
AO = of_package("torchao.optim", "AdamW8bit", lr=1e-4)
BNB = of_package("bitsandbytes.optim", "AdamW8bit", lr=1e-4)
ADABELIEF = of_package("pytorch_optimizer", "AdaBelief", lr=1e-4)
FOREACH = of_package("torch.optim", "AdamW", lr=1e-4, foreach=True)
LIMIT = 0.005
CASES = (
    Case("own-step", f"{OWN}, 124 M parameters in 148 tensors", own, of="optimizer", target=0.02),
    Case("own", OWN, own, target=0.001),
    Case("fused", "torch AdamW, fused", FUSED, target=LIMIT),
    Case("foreach", "torch AdamW, foreach", FOREACH, target=LIMIT),
    Case("adafactor", "transformers Adafactor", ADAFACTOR, target=LIMIT, needs="transformers"),
    Case("bitsandbytes", "bitsandbytes AdamW8bit", BNB, target=LIMIT, needs="bitsandbytes"),
    Case("torchao", "torchao AdamW8bit", AO, target=LIMIT, needs="torchao"),
    Case("adabelief", "pytorch_optimizer AdaBelief", ADABELIEF, target=LIMIT, needs="pytorch-optimizer"),
    Case("composer", "torch AdamW, fused", FUSED, by="composer"),
    Case("wandb", "torch AdamW, fused", FUSED, by="wandb", needs="wandb"),
)
