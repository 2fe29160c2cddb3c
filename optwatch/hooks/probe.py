"""The probe of one optimizer: it hears of every step and hands the numbers to the publisher.

It runs inside the training loop, so it never waits, never raises and keeps neither tensors nor the optimizer alive.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from optwatch.board import Histogram, Series, Table
from optwatch.board.writer import Values
from optwatch.hooks.arrivals import BESIDE
from optwatch.hooks.figures import NONE, Figures, Joined, figures, histogram, labelled
from optwatch.hooks.parts import NO_SAMPLING, Parts, Sampling
from optwatch.hooks.publisher import Source
from optwatch.hooks.replays import PAUSE, Replays
from optwatch.hooks.sizes import Sizes
from optwatch.hooks.tabulation import Naming, Replicas, Tabulation
from optwatch.hooks.transfer import Rows, Transfer
from optwatch.kernels.plan import DECISION
from optwatch.metrics.fields import CHEAP_FIELDS
from optwatch.optim import Optimizer, StatsLayout, StepStats
from optwatch.optim.formats import formats_of

#: Learning rates of more parameter groups than this are not shown: a group may be a single tensor.
MAXIMUM_RATES = 16
#: Wraps what the training loop calls, so that nothing it raises gets there.
Guard = Callable[[Callable[..., None]], Callable[..., None]]

_NONFINITE = CHEAP_FIELDS.index("nonfinite")
_SKIPPED = DECISION.index("skipped")
#: The metrics of the first entries of a decision.
DECIDED = ("optwatch.gradient.norm_before_clipping", "optwatch.gradient_clip.ratio")

COUNTED = (
    "optwatch.steps",
    "optwatch.steps_skipped",
    "optwatch.nonfinite_elements",
    "optwatch.adapter_errors",
)

#: Takes the rows of a step by the ``id`` of the source that they belong to.
Publish = Callable[["Probe", Mapping[int, Values], int], None]


class Probe:
    """Watches one optimizer: statistics from the kernel of optwatch's own, of any other what an adapter can read.

    ``publish`` is called with the rows ``[tensors, fields]`` of a step once they have arrived, a step later on a
    GPU, and with the number of that step. ``warn`` is told in a line what of all this had to end.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, name: str, naming: Naming, every: int,
        replicas: Replicas,
        publish: Publish, changed: Callable[[], None], guard: Guard,
        sampling: Sampling = NO_SAMPLING, warn: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.name = name
        self._optimizer, self._every = weakref.ref(optimizer), every
        self._publish, self._changed = publish, changed
        self._layouts: tuple[StatsLayout, ...] = ()
        self._main = Tabulation(name, naming, replicas)
        self._parts = Parts(optimizer, name, naming, replicas, sampling, warn)
        self._tabulations = (self._main, *self._parts.sources)
        self._sizes = Sizes(name, self._parts.slot_of)
        self._transfer, self._replays = Transfer(), Replays()
        self._step = self._replayed = (
            0  # calls of the optimizer's own, and replays of those that were captured
        )
        self._warn, self._look = warn, guard(self._take_replays)
        self._alone = threading.RLock()  # between steps and the thread that looks for replays
        self._follower: threading.Thread | None = None
        self._closed = threading.Event()
        self._duration = histogram("optwatch.optimizer_step_duration")
        self._histograms = [(self._series("optwatch.optimizer_step_duration"), self._duration)]
        self._counter_series = tuple(map(self._series, COUNTED))
        self._rates = self._decision = self._shared = NONE
        self._gauges = Joined()
        self._steps = self.skipped = (
            0  # calls of step(), and those of them and of a scaler's that updated nothing
        )
        self._nonfinite = 0.0
        self._started = math.nan
        self._stats: StepStats | None = None
        self._capturable = False
        self.then: Callable[[torch.optim.Optimizer, Probe], None] | None = None  # called after each step
        self.overhead = 0.0  # seconds that this probe took from the training loop
        self._unhook: list[Callable[[], None]] = [
            optimizer.register_step_pre_hook(guard(self._before)).remove,
            optimizer.register_step_post_hook(guard(self._after)).remove,
        ]
        self._unsubscribe: Callable[[], None] = lambda: None
        if isinstance(optimizer, Optimizer):
            self._unsubscribe = optimizer.subscribe(self._receive, every)
        self._sizes.read(optimizer, full=True)
        self._read_rates(optimizer)

    @property
    def table(self) -> Table | None:
        """What the rows of a step describe."""
        return self._main.table

    @property
    def sources(self) -> list[Source]:
        """This, and the tables of sampled blocks."""
        return [self, *self._parts.sources]

    @property
    def sizes(self) -> Sizes:
        """The bytes of parameters, gradients and state, as last read."""
        return self._sizes

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """What it watches, if that still exists."""
        return self._optimizer()

    @property
    def alive(self) -> bool:
        """Whether the optimizer still exists."""
        return self._optimizer() is not None

    @property
    def steps(self) -> int:
        """Calls of ``step()`` so far."""
        return self._steps

    def skip(self) -> None:
        """Count a step that a gradient scaler left out."""
        self.skipped += 1

    @property
    def rates(self) -> Sequence[float]:
        """The learning rates of the parameter groups at the newest step."""
        return self._rates.values

    # --- what the training loop calls ------------------------------------------------------------------------------

    def _before(self, *_: object) -> None:
        begun = time.perf_counter()
        optimizer = self._optimizer()
        if optimizer is not None and not _captured(optimizer):
            self._parts.before(optimizer, self._is_full(self._steps + 1))
        self._started = time.perf_counter()
        self.overhead += self._started - begun

    def _receive(self, stats: StepStats) -> None:  # nothing here can fail, so nothing guards it
        self._stats = stats

    def _is_full(self, step: int) -> bool:
        return step % self._every == 1 % self._every

    def _after(self, *_: object) -> None:
        ended = time.perf_counter()
        optimizer = self._optimizer()
        if optimizer is None:
            return
        stats, self._stats = self._stats, None
        if stats is not None and stats.captured is not None:
            self._capture(stats)
            return
        self._duration.observe(ended - self._started)
        with self._alone:
            self._step_taken(optimizer, stats)
        if self.then is not None:
            self.then(optimizer, self)
        self.overhead += time.perf_counter() - ended

    def _step_taken(self, optimizer: torch.optim.Optimizer, stats: StepStats | None) -> None:
        """Publish what is there of a step."""
        self._steps += 1
        full = self._is_full(self._steps) if stats is None else stats.full
        stats, changed = self._parts.after(optimizer, stats, self._steps, full)
        if changed:
            self._changed()
        if stats is None:
            self._lose()
            self._read_sizes(optimizer, full)
            self._publish(self, {}, self._steps)
        else:
            self._take(optimizer, stats)
        self._read_rates(optimizer)

    def _lose(self) -> None:
        """What cannot be had any more is not shown."""
        if self._main.table is not None:
            self._layouts = ()
            self._main.clear()
            self._read_replicas()
            self._changed()

    def _take(self, optimizer: torch.optim.Optimizer, stats: StepStats) -> None:
        """Start the rows on their way and publish those that have arrived."""
        if not stats.plans:
            self.skipped += 1
        changed = stats.layouts != self._layouts
        self._layouts, self._step = stats.layouts, stats.step
        if changed:  # which an option that becomes another one makes of it
            self._capturable = any(group.get("capturable") for group in optimizer.param_groups)
        if self._capturable and (changed or not self._replays.prepared):
            self._replays.prepare(stats)
        if (changed or stats.full) and self._main.lay_out(
            stats.layouts, optimizer, absent=self._parts.absent, sampled=self._parts.sampled
        ):
            self._read_replicas()
            self._changed()
        self._read_sizes(optimizer, stats.full, changed)
        self._transfer.send(stats)
        for rows in self._transfer.arrived():
            self._deliver(rows)

    def _read_sizes(self, optimizer: torch.optim.Optimizer, full: bool, again: bool = False) -> None:
        if self._sizes.read(optimizer, full, again):
            self._changed()

    def _deliver(self, rows: Rows) -> None:
        held = [[plan for plan in rows.plans if one.holds(plan[0])] for one in self._tabulations]
        if not self._layouts or sum(map(len, held)) != len(rows.plans):
            return  # of a layout that is gone by now
        taken = rows.decision is None or not rows.decision[_SKIPPED]
        made: dict[int, Values] = {}
        for source, tabulation, plans in zip(self.sources, self._tabulations, held, strict=True):
            if tabulation is not self._main and not (plans and taken):
                continue
            # A step that was not taken has nothing but its gradients.
            table = tabulation.fill(plans, rows.full and taken)
            if table is not None:
                made[id(source)] = table
        self._nonfinite += sum(sum(values[:, _NONFINITE].tolist()) for _, values in held[0])
        self._read_decision(rows.decision)
        self._nonfinite += rows.missed[0]
        self.skipped += int(rows.missed[1])
        self._publish(self, made, rows.step + self._replayed)

    # --- beside the training loop, where it replays a graph ---------------------------------------------------------

    def _capture(self, stats: StepStats) -> None:
        """Have each replay of a step that is being captured leave its rows, and look for them from now on."""
        if self._parts.end_sampling():
            self._changed()
        if not self._replays.capture(stats):
            self._warn(
                f"the steps of {self.name} that a CUDA graph replays are not watched: before each capture take a step "
                "outside of it, with all parameters on one device"
            )
        elif self._follower is None:
            self._follower = threading.Thread(target=self._follow, name="optwatch-replays", daemon=True)
            self._follower.start()

    def _follow(self) -> None:
        BESIDE.yes = True
        while not self._closed.wait(PAUSE) and self.alive:
            self._look()

    def _take_replays(self, *_: object) -> None:
        """Publish the newest replay of each graph; those that it followed are counted."""
        with self._alone:
            for replays, rows in self._replays.newest():
                self._steps += replays
                self._replayed += replays
                rows.step = self._step
                self._deliver(rows)

    # --- what the publisher reads ----------------------------------------------------------------------------------

    def gauges(self) -> Figures:
        """Bytes, learning rates, what clipping did, and how many ranks hold the same."""
        return self._gauges.of(self._sizes.figures, self._rates, self._decision, self._shared)

    def counters(self) -> Figures:
        """Steps, steps without an update, non-finite gradient elements, errors in reading the state."""
        return Figures(self._counter_series, (self._steps, self.skipped, self._nonfinite, self._parts.errors))

    def histograms(self) -> Sequence[tuple[Series, Histogram]]:
        """The time inside step()."""
        return self._histograms

    def infos(self) -> Sequence[Series]:
        """The optimizer's rule, storage formats and backends."""
        optimizer = self._optimizer()
        own = isinstance(optimizer, Optimizer)
        formats = (
            {str(state) for group in optimizer.param_groups for state in formats_of(group)}
            if optimizer and own
            else {codec for layout in self._layouts for codec in layout.codecs} or {"unknown"}
        )
        backends = {layout.backend for layout in self._layouts} or {"unknown"}
        rules = {type(optimizer).__name__.lower()}
        if isinstance(optimizer, Optimizer):
            rules = {optimizer.rule_for(group).name for group in optimizer.param_groups}
        labels = {
            "rule": "+".join(sorted(rules)),
            "codec": "+".join(sorted(formats)),
            "backend": "+".join(sorted(backends)),
        }
        return [Series("optwatch.optimizer", {"optimizer": self.name, **labels})]

    def unsubscribe(self) -> None:
        """Have no more statistics summed. Unlike `close` this may be called from a hook of the optimizer."""
        self._unsubscribe()

    def close(self) -> None:
        """Hear of no more steps."""
        self._closed.set()
        if self._follower is not None and self._follower is not threading.current_thread():
            self._follower.join(PAUSE)
        self._unsubscribe()
        for unhook in self._unhook:
            unhook()

    def drain(self) -> None:
        """Publish what is still on its way, waiting briefly for the device."""
        for rows in self._transfer.drain():
            self._deliver(rows)
        self._replays.settle()
        self._take_replays()

    # --- series ----------------------------------------------------------------------------------------------------

    def _series(self, name: str) -> Series:
        """The series of this name, of this optimizer."""
        return labelled(name, ("optimizer", self.name))

    def _read_replicas(self) -> None:
        """How many ranks hold the same, which the table knows."""
        table = self.table
        self._shared = figures(
            [] if table is None else [(self._series("optwatch.replicas"), float(table.replicas))]
        )

    def _read_decision(self, decision: NDArray[np.float64] | None) -> None:
        """The norm of all gradients and the factor of clipping, and whether the step was taken."""
        if decision is None and self._decision is NONE:
            return
        values = [] if decision is None else decision[: len(DECIDED)].tolist()
        if len(values) != len(self._decision.values):
            self._decision = figures(
                (self._series(name), value) for name, value in zip(DECIDED, values, strict=False)
            )
            self._changed()
        self._decision = Figures(self._decision.series, values)
        if decision is not None:
            self.skipped += int(decision[_SKIPPED])

    def _read_rates(self, optimizer: torch.optim.Optimizer) -> None:
        rates = [_on_host(group.get("lr")) for group in optimizer.param_groups[:MAXIMUM_RATES]]
        if len(rates) != len(self._rates.values):
            self._rates = figures((self._rate(number), rate) for number, rate in enumerate(rates))
            self._changed()
        self._rates = Figures(self._rates.series, rates)

    def _rate(self, group: int) -> Series:
        return labelled("optwatch.learning_rate", ("optimizer", self.name), ("param_group", str(group)))


def _captured(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, Optimizer) and optimizer.capturing


def _on_host(value: object) -> float:
    """A number as a float; NaN for one that lies on a device, since reading it would wait."""
    if type(value) is float:
        return value
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        return math.nan
    return float(cast(Any, value)) if value is not None else math.nan
