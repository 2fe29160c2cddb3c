"""What the live view shows: plain data, formed from scrapes of an agent's metrics page.

Bytes are summed over ranks, and so are the squares of norms, divided by the ranks that hold the same tensors. Ratios
are the largest over ranks.
A value that the page does not have is None, never zero.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from optwatch.cli.scrape import Page

FP32_BYTES = 4
_RATE_WINDOW = 8  # scrapes over which steps/s and the overhead are averaged
_LOSSES = 400  # scrapes whose loss the little curve shows


@dataclass(frozen=True)
class SlotView:
    """How one slot of one optimizer is stored."""

    optimizer: str
    slot: str
    dtypes: tuple[str, ...]  # of the codes and of their scales, by size
    actual_bytes: float  # found: the sum of the storages
    expected_bytes: float | None  # what the constructor asked for
    fp32_bytes: float | None  # what the slot would take in fp32
    error_ratio: float | None  # quantisation error, the worst group's

    @property
    def as_expected(self) -> bool:
        """Whether the state is stored as the constructor asked for, to the byte."""
        return self.expected_bytes is None or self.actual_bytes == self.expected_bytes


@dataclass(frozen=True)
class GroupView:
    """The newest statistics of one group of tensors."""

    optimizer: str
    group: str
    gradient_norm: float | None
    moment_norms: dict[str, float]  # slot -> norm
    update_to_parameter: float | None
    update_error: float | None  # error of the update from storing the state


@dataclass(frozen=True)
class EventView:
    """A kind of run event that has happened."""

    name: str
    times: int  # on the rank that saw most of them
    newest: float | None  # Unix time


@dataclass(frozen=True)
class DeviceView:
    """Memory of one GPU, as its driver reports it."""

    gpu: str
    used_bytes: float | None
    total_bytes: float | None


@dataclass(frozen=True)
class RunView:
    """One run: all its ranks on the agent's node."""

    run_id: str
    ranks: int
    ranks_up: int
    state: str  # running, finished, failed, lost; "" when unknown
    step: float | None
    loss: float | None
    losses: tuple[float, ...]
    steps_per_second: float | None
    overhead_ratio: float | None  # of the training time, over the last scrapes
    mean_overhead_ratio: float | None  # the same, over the whole run
    last_step_time: float | None  # Unix time
    tokens_per_second: float | None  # of all ranks, over the whole run
    events: tuple[EventView, ...]  # the newest first
    parameters: float | None
    host_bytes: float | None
    slots: tuple[SlotView, ...]
    groups: tuple[GroupView, ...]

    @property
    def actual_bytes(self) -> float | None:
        """State bytes over all slots."""
        return _sum(slot.actual_bytes for slot in self.slots)

    @property
    def expected_bytes(self) -> float | None:
        """What the constructors asked for, over all slots."""
        return _sum(slot.expected_bytes for slot in self.slots)

    @property
    def fp32_bytes(self) -> float | None:
        """What all slots would take in fp32."""
        return _sum(slot.fp32_bytes for slot in self.slots)

    @property
    def as_expected(self) -> bool:
        """Whether every slot is stored as asked for."""
        return all(slot.as_expected for slot in self.slots)

    @property
    def update_error(self) -> float | None:
        """The worst group's error of the update from storing the state."""
        return _max(group.update_error for group in self.groups)


@dataclass(frozen=True)
class Snapshot:
    """All that one scrape tells, the newest run first."""

    runs: tuple[RunView, ...]
    devices: tuple[DeviceView, ...]


@dataclass
class Tracker:
    """Turns successive pages into snapshots: rates and curves need more than one page."""

    _clocks: dict[str, collections.deque[tuple[float, float, float]]] = field(default_factory=dict)
    _losses: dict[str, collections.deque[float]] = field(default_factory=dict)

    def update(self, page: Page) -> Snapshot:
        """The snapshot of the newest page."""
        names = {labels["run_id"] for labels, _ in page.select("optwatch.rank_up")}
        runs = [self._run(page, name) for name in sorted(names)]
        runs.sort(key=lambda run: (run.ranks_up > 0, run.last_step_time or 0.0), reverse=True)
        for name in self._clocks.keys() - names:
            del self._clocks[name], self._losses[name]
        return Snapshot(runs=tuple(runs), devices=_devices(page))

    def _run(self, page: Page, name: str) -> RunView:
        up = [value for _, value in page.select("optwatch.rank_up", run_id=name)]
        step = _largest(page, "optwatch.step", run_id=name)
        rate, overhead = self._rates(page, name)
        loss = _first_rank(page, "optwatch.loss", name)
        return RunView(
            run_id=name,
            ranks=len(up),
            ranks_up=int(sum(up)),
            state=_state(page, name),
            step=step,
            loss=loss,
            losses=self._remember_loss(name, loss),
            steps_per_second=rate,
            overhead_ratio=overhead,
            mean_overhead_ratio=_mean_overhead(page, name),
            last_step_time=_largest(page, "optwatch.last_step_timestamp", run_id=name),
            tokens_per_second=_tokens_per_second(page, name),
            events=_events(page, name),
            parameters=page.total("optwatch.parameters", run_id=name),
            host_bytes=page.total("optwatch.host_memory.rss", run_id=name),
            slots=tuple(_slots(page, name)),
            groups=tuple(_groups(page, name)),
        )

    def _rates(self, page: Page, name: str) -> tuple[float | None, float | None]:
        """Steps per second and the part of the training time that watching took, over the last scrapes.

        Both come from the run's own clocks (the histogram of step durations), so that the time of the scrape does
        not matter. The first scrape gives the mean over the whole run.
        """
        count = page.total("optwatch.step_duration#count", run_id=name)
        seconds = page.total("optwatch.step_duration#sum", run_id=name)
        spent = page.total("optwatch.overhead", run_id=name)
        if count is None or seconds is None:
            return None, None
        clocks = self._clocks.setdefault(name, collections.deque([(0.0, 0.0, 0.0)], maxlen=_RATE_WINDOW))
        if len(clocks) > 1 and clocks[0] == (0.0, 0.0, 0.0):
            clocks.popleft()  # from the second scrape on, only what happened since the first
        clocks.append((count, seconds, spent or 0.0))
        steps, duration, overhead = (new - old for new, old in zip(clocks[-1], clocks[0], strict=True))
        if steps <= 0 or duration <= 0:
            return None, None
        return steps / duration, None if spent is None else overhead / duration

    def _remember_loss(self, name: str, loss: float | None) -> tuple[float, ...]:
        losses = self._losses.setdefault(name, collections.deque(maxlen=_LOSSES))
        if loss is not None:
            losses.append(loss)
        return tuple(losses)


def _slots(page: Page, name: str) -> Iterable[SlotView]:
    keys = {
        (labels["optimizer"], labels["slot"]): None
        for metric in ("optwatch.optimizer.state_expected", "optwatch.optimizer.state")
        for labels, _ in page.select(metric, run_id=name)
    }
    for optimizer, slot in keys:
        of_slot = {"run_id": name, "optimizer": optimizer, "slot": slot}
        found = list(page.select("optwatch.optimizer.state", **of_slot))
        parameters = page.total("optwatch.parameters", run_id=name, optimizer=optimizer)
        yield SlotView(
            optimizer=optimizer,
            slot=slot,
            dtypes=_dtypes(found),
            actual_bytes=sum(value for _, value in found),
            expected_bytes=page.total("optwatch.optimizer.state_expected", **of_slot),
            fp32_bytes=_fp32_bytes(slot, sum(value for _, value in found), parameters),
            error_ratio=_largest(page, "optwatch.quantization_error.ratio", **of_slot),
        )


def _dtypes(found: Iterable[tuple[dict[str, str], float]]) -> tuple[str, ...]:
    sizes = collections.Counter[str]()
    for labels, value in found:
        sizes[labels["dtype"]] += int(value)
    return tuple(dtype for dtype, size in sizes.most_common() if size)


def _fp32_bytes(slot: str, actual: float, parameters: float | None) -> float | None:
    """What a slot would take in fp32: a number for each parameter, but for the step counters one for each tensor."""
    if slot == "step":
        return actual
    return None if parameters is None else FP32_BYTES * parameters


def _groups(page: Page, name: str) -> Iterable[GroupView]:
    keys = {
        (labels["optimizer"], labels["group"]): None
        for metric in ("optwatch.gradient.norm", "optwatch.update_quantization_error.ratio")
        for labels, _ in page.select(metric, run_id=name)
    }
    for optimizer, group in keys:
        of_group = {"run_id": name, "optimizer": optimizer, "group": group}
        slots = {labels["slot"]: None for labels, _ in page.select("optwatch.moment.norm", **of_group)}
        norms = {slot: _norm(page, "optwatch.moment.norm", **of_group, slot=slot) for slot in slots}
        moments = {slot: norm for slot, norm in norms.items() if norm is not None}
        yield GroupView(
            optimizer=optimizer,
            group=group,
            gradient_norm=_norm(page, "optwatch.gradient.norm", **of_group),
            moment_norms=moments,
            update_to_parameter=_largest(page, "optwatch.update_to_parameter.ratio", **of_group),
            update_error=_largest(page, "optwatch.update_quantization_error.ratio", **of_group),
        )


def _mean_overhead(page: Page, name: str) -> float | None:
    seconds = page.total("optwatch.step_duration#sum", run_id=name)
    spent = page.total("optwatch.overhead", run_id=name)
    return spent / seconds if seconds and spent is not None else None


def _tokens_per_second(page: Page, name: str) -> float | None:
    """Tokens of all ranks over the time of one: they run at the same time."""
    tokens = page.total("optwatch.training.tokens", run_id=name)
    seconds = _largest(page, "optwatch.step_duration#sum", run_id=name)
    return tokens / seconds if tokens is not None and seconds else None


def _events(page: Page, name: str) -> tuple[EventView, ...]:
    times: dict[str, float] = {}
    for labels, value in page.select("optwatch.events", run_id=name):
        times[labels["event"]] = max(value, times.get(labels["event"], 0.0))
    found = [
        EventView(event, int(n), _largest(page, "optwatch.last_event_timestamp", run_id=name, event=event))
        for event, n in times.items()
        if n
    ]
    return tuple(sorted(found, key=lambda event: event.newest or 0.0, reverse=True))


def _devices(page: Page) -> tuple[DeviceView, ...]:
    used = {labels["gpu"]: value for labels, value in page.select("optwatch.device.memory.used")}
    total = {labels["gpu"]: value for labels, value in page.select("optwatch.device.memory.total")}
    return tuple(DeviceView(gpu, used.get(gpu), total.get(gpu)) for gpu in {**used, **total})


def _state(page: Page, name: str) -> str:
    """The state of the run: the worst of its ranks'."""
    states = {labels["state"] for labels, value in page.select("optwatch.run_state", run_id=name) if value}
    return next((state for state in ("failed", "lost", "running", "finished") if state in states), "")


def _first_rank(page: Page, metric: str, name: str) -> float | None:
    ranks = {int(labels["rank"]): value for labels, value in page.select(metric, run_id=name)}
    return ranks[min(ranks)] if ranks else None


def _largest(page: Page, metric: str, **labels: str) -> float | None:
    """The largest of the matching samples, see `_max`."""
    return _max(value for _, value in page.select(metric, **labels))


def _norm(page: Page, metric: str, **labels: str) -> float | None:
    """The norm over all ranks: of their pieces where the tensors are sharded, of one copy where they are not."""
    squares = []
    for found, value in page.select(metric, **labels):
        of_rank = {key: found[key] for key in ("run_id", "rank", "optimizer")}
        squares.append(value**2 / (_largest(page, "optwatch.replicas", **of_rank) or 1.0))
    return math.sqrt(sum(squares)) if squares else None


def _sum(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) if found else None


def _max(values: Iterable[float | None]) -> float | None:
    """The largest value, NaN if any is NaN (it must show), None without values."""
    found = [value for value in values if value is not None]
    return next((value for value in found if value != value), max(found)) if found else None
