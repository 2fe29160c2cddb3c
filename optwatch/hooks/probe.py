"""The probe of one optimizer: it hears of every step and hands the numbers to the publisher.

It runs inside the training loop, so it never waits, never raises and keeps neither tensors nor the optimizer alive.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from optwatch.board import Histogram, Series, Table, TensorInfo
from optwatch.board.writer import Values
from optwatch.hooks.publisher import histogram
from optwatch.hooks.transfer import Rows, Transfer
from optwatch.kernels.plan import DECISION
from optwatch.metrics.fields import CHEAP_FIELDS, maximum_columns, row_fields, row_length
from optwatch.optim import Optimizer, StatsLayout, StepStats
from optwatch.optim.base import count_state_bytes
from optwatch.optim.formats import formats_of
from optwatch.optim.sharded import local

#: Learning rates of more parameter groups than this are not shown: a group may be a single tensor.
MAXIMUM_RATES = 16
SeriesValues = list[tuple[Series, float]]
#: Wraps what the training loop calls, so that nothing it raises gets there.
Guard = Callable[[Callable[..., None]], Callable[..., None]]

_NONFINITE = CHEAP_FIELDS.index("nonfinite")
_SKIPPED = DECISION.index("skipped")
#: The metrics of the first entries of a decision.
DECIDED = ("optwatch.gradient.norm_before_clipping", "optwatch.gradient_clip.ratio")

Publish = Callable[["Probe", "Values | None", int], None]
#: Gives the name and the group of each parameter of an optimizer.
Naming = Callable[[torch.optim.Optimizer], "tuple[Sequence[str], Sequence[str]]"]
#: Gives the number of ranks that hold the same piece of a tensor.
Replicas = Callable[[torch.Tensor], int]


class Probe:
    """Watches one optimizer: statistics from optwatch's own, bytes and durations from any.

    ``publish`` is called with the rows ``[tensors, fields]`` of a step once they have arrived, a step later on a
    GPU, and with the number of that step.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, name: str, naming: Naming, every: int,
        replicas: Replicas,
        publish: Publish, changed: Callable[[], None], guard: Guard,
    ) -> None:  # fmt: skip
        self.name = name
        self.table: Table | None = None
        self._optimizer = weakref.ref(optimizer)
        self._naming, self._every, self._replicas = naming, every, replicas
        self._publish, self._changed = publish, changed
        self._layouts: tuple[StatsLayout, ...] = ()
        self._offsets: dict[int, int] = {}  # first row of each layout, by identity
        self._share: Values | None = None  # of each row, where tensors differ in their replicas
        self._transfer = Transfer()
        self._duration = histogram("optwatch.optimizer_step_duration")
        self._bytes: SeriesValues = []
        self._gradients: SeriesValues = []
        self._rates: SeriesValues = []
        self._steps = self.skipped = (
            0  # calls of step(), and those of them and of a scaler's that updated nothing
        )
        self._nonfinite = 0.0
        self._decision: SeriesValues = []
        self._started = math.nan
        self._stats: StepStats | None = None
        self.overhead = 0.0  # seconds that this probe took from the training loop
        self._unhook: list[Callable[[], None]] = [
            optimizer.register_step_pre_hook(guard(self._before)).remove,
            optimizer.register_step_post_hook(guard(self._after)).remove,
        ]
        self._unsubscribe: Callable[[], None] = lambda: None
        if isinstance(optimizer, Optimizer):
            self._unsubscribe = optimizer.subscribe(guard(self._receive), every)
        self._describe(optimizer)

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

    def rates(self) -> list[float]:
        """The learning rates of the parameter groups at the newest step."""
        return [rate for _, rate in self._rates]

    # --- what the training loop calls ------------------------------------------------------------------------------

    def _before(self, *_: object) -> None:
        self._started = time.perf_counter()

    def _receive(self, stats: StepStats) -> None:
        self._stats = stats

    def _after(self, *_: object) -> None:
        ended = time.perf_counter()
        optimizer = self._optimizer()
        if optimizer is None:
            return
        self._duration.observe(ended - self._started)
        self._steps += 1
        stats, self._stats = self._stats, None
        if stats is None:
            if self._steps % self._every == 1 % self._every:
                self._describe(optimizer)
            self._publish(self, None, self._steps)
        else:
            self._take(optimizer, stats)
        self._read_rates(optimizer)
        self.overhead += time.perf_counter() - ended

    def _take(self, optimizer: torch.optim.Optimizer, stats: StepStats) -> None:
        """Start the rows on their way and publish those that have arrived."""
        if not stats.plans:
            self.skipped += 1
        changed = stats.layouts != self._layouts
        if changed:
            self._layouts = stats.layouts
            self._tabulate(optimizer)
        if changed:
            self._describe(optimizer)
        elif stats.full:
            self._read_gradients(optimizer)
        self._transfer.send(stats)
        for rows in self._transfer.arrived():
            self._deliver(rows)

    def _deliver(self, rows: Rows) -> None:
        if not self._layouts or any(id(layout) not in self._offsets for layout, _ in rows.plans):
            return  # of a layout that is gone by now
        assert self.table is not None
        taken = rows.decision is None or not rows.decision[_SKIPPED]
        full = rows.full and taken  # a step that was not taken has nothing but its gradients
        width = row_length(len(self.table.slots)) if full else len(CHEAP_FIELDS)
        table = np.zeros((len(self.table.tensors), width))
        for layout, values in rows.plans:
            start = self._offsets[id(layout)]
            place = table[start : start + len(values)]
            if full and layout.slots != self.table.slots:
                place[:, _columns(layout, self.table)] = values
            else:
                place[:] = values[:, :width]
        self._nonfinite += table[:, _NONFINITE].sum()
        if self._share is not None:
            summed = ~maximum_columns(len(self.table.slots))[:width]
            table[:, summed] *= self._share
        self._read_decision(rows.decision)
        self._publish(self, table, rows.step)

    # --- what the publisher reads ----------------------------------------------------------------------------------

    def gauges(self) -> Sequence[tuple[Series, float]]:
        """Bytes, learning rates, what clipping did, and how many ranks hold the same."""
        shared = [] if self.table is None else [float(self.table.replicas)]
        replicas = [(Series("optwatch.replicas", {"optimizer": self.name}), number) for number in shared]
        return self._bytes + self._gradients + self._rates + self._decision + replicas

    def counters(self) -> Sequence[tuple[Series, float]]:
        """Steps, steps without an update, non-finite gradient elements."""
        return self._counters_of(self._steps, self.skipped, self._nonfinite)

    def histograms(self) -> Sequence[tuple[Series, Histogram]]:
        """The time inside step()."""
        return [(Series("optwatch.optimizer_step_duration", {"optimizer": self.name}), self._duration)]

    def infos(self) -> Sequence[Series]:
        """The optimizer's rule, storage formats and backends."""
        optimizer = self._optimizer()
        own = isinstance(optimizer, Optimizer)
        formats = (
            {str(state) for group in optimizer.param_groups for state in formats_of(group)}
            if optimizer and own
            else {"unknown"}
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
        self._unsubscribe()
        for unhook in self._unhook:
            unhook()

    def drain(self) -> None:
        """Publish what is still on its way, waiting briefly for the device."""
        for rows in self._transfer.drain():
            self._deliver(rows)

    # --- series ----------------------------------------------------------------------------------------------------

    def _counters_of(self, *values: float) -> list[tuple[Series, float]]:
        names = ("optwatch.steps", "optwatch.steps_skipped", "optwatch.nonfinite_elements")
        labels = {"optimizer": self.name}
        return [(Series(name, labels), value) for name, value in zip(names, values, strict=True)]

    def _tabulate(self, optimizer: torch.optim.Optimizer) -> None:
        """Describe the rows: one table, plan after plan."""
        names, groups = self._naming(optimizer)
        self._offsets, start = {}, 0
        for layout in self._layouts:
            self._offsets[id(layout)] = start
            start += len(layout.indices)
        if not self._layouts:
            return
        # Groups of one optimizer may differ in their slots (amsgrad): a plan leaves the columns of others' at zero.
        slots = {
            s: m for layout in self._layouts for s, m in zip(layout.slots, layout.second_moments, strict=True)
        }
        self.table = Table(
            optimizer=self.name,
            slots=tuple(slots),
            second_moments=tuple(slots.values()),
            tensors=tuple(
                TensorInfo(names[index], groups[index], numel)
                for layout in self._layouts
                for index, numel in zip(layout.indices, layout.numel, strict=True)
            ),
            replicas=self._share_replicas(optimizer),
        )
        self._changed()

    def _share_replicas(self, optimizer: torch.optim.Optimizer) -> int:
        """The number by which sums over ranks of every row are to be divided.

        Where tensors differ in it (a part of the model is sharded, another copied), the rows of those with more
        copies are made smaller for it beforehand.
        """
        params = [param for group in optimizer.param_groups for param in group["params"]]
        copies = np.array(
            [self._replicas(params[index]) for layout in self._layouts for index in layout.indices],
            np.float64,
        )
        least = int(copies.min())
        self._share = None if (copies == least).all() else least / copies[:, None]
        return least

    def _describe(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the bytes anew. Those of own optimizers change only with the layout, which every step checks."""
        described = state_series(optimizer, self.name)
        described += tensor_series(optimizer, self.name, ("parameter", "parameters"))
        if [series for series, _ in described] != [series for series, _ in self._bytes]:
            self._changed()
        self._bytes = described
        self._read_gradients(optimizer)
        if not self._rates:
            self._read_rates(optimizer)

    def _read_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        found = tensor_series(optimizer, self.name, ("gradient",))
        if [series for series, _ in found] != [series for series, _ in self._gradients]:
            self._changed()
        self._gradients = found

    def _read_decision(self, decision: NDArray[np.float64] | None) -> None:
        """The norm of all gradients and the factor of clipping, and whether the step was taken."""
        values = () if decision is None else decision[: len(DECIDED)].tolist()
        if len(values) != len(self._decision):
            self._changed()
        labels = {"optimizer": self.name}
        self._decision = [(Series(name, labels), value) for name, value in zip(DECIDED, values, strict=False)]
        if decision is not None:
            self.skipped += int(decision[_SKIPPED])

    def _read_rates(self, optimizer: torch.optim.Optimizer) -> None:
        groups = optimizer.param_groups[:MAXIMUM_RATES]
        if len(groups) != len(self._rates):
            self._rates = [
                (Series("optwatch.learning_rate", {"optimizer": self.name, "param_group": str(i)}), math.nan)
                for i in range(len(groups))
            ]
            self._changed()
        self._rates = [
            (series, _on_host(group.get("lr")))
            for (series, _), group in zip(self._rates, groups, strict=True)
        ]


def _columns(layout: StatsLayout, table: Table) -> list[int]:
    """The columns of ``table`` that the columns of a full row of ``layout`` go to."""
    position = {name: i for i, name in enumerate(row_fields(table.slots))}
    return [position[name] for name in row_fields(layout.slots)]


def _on_host(value: object) -> float:
    """A number as a float; NaN for one that lies on a device, since reading it would wait."""
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        return math.nan
    return float(cast(Any, value)) if value is not None else math.nan


def state_series(optimizer: torch.optim.Optimizer, name: str) -> SeriesValues:
    """The bytes of the optimizer's state, as found and, for optwatch's own, as asked for."""
    if isinstance(optimizer, Optimizer):
        actual, expected = optimizer.state_bytes(), optimizer.expected_state_bytes()
    else:
        actual, expected = count_state_bytes(optimizer.state.values(), ()), {}
    return [
        (Series(f"optwatch.optimizer.{metric}", {"optimizer": name, **kind._asdict()}), float(number))
        for metric, counted in (("state", actual), ("state_expected", expected))
        for kind, number in sorted(counted.items())
    ]


def tensor_series(optimizer: torch.optim.Optimizer, name: str, metrics: Sequence[str]) -> SeriesValues:
    """Of parameters and gradients the bytes (``parameter``, ``gradient``) and the elements (``parameters``)."""
    totals: dict[tuple[str, torch.dtype, torch.device], int] = defaultdict(int)
    for group in optimizer.param_groups:
        for param in group["params"]:
            for metric in metrics:
                tensor = param.grad if metric == "gradient" else param
                if tensor is not None:
                    tensor = local(tensor)
                    size = tensor.numel() if metric == "parameters" else tensor.nbytes
                    totals[metric, tensor.dtype, tensor.device] += size
    labels = {
        key: {"optimizer": name, "dtype": str(key[1]).removeprefix("torch."), "device": str(key[2])}
        for key in totals
    }
    series = [(Series(f"optwatch.{key[0]}", labels[key]), float(number)) for key, number in totals.items()]
    return sorted(series, key=lambda pair: pair[0].key)
