"""What belongs to the training loop and to no optimizer: scalars, progress, run events, the time of a step."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from optwatch.board import Histogram, Series, Table
from optwatch.hooks.arrivals import Arrivals
from optwatch.hooks.figures import Figures, histogram, labelled

#: What ``watch.count()`` counts.
PROGRESS = ("tokens", "samples")
#: Run events that are noticed without being told. Others can be named by the training loop.
EVENTS = ("checkpoint", "resume", "format_conversion", "learning_rate_change", "skipped_step", "oom")
#: Label values are bounded: so many names of scalars, and of events besides those above.
MAXIMUM_SCALARS, MAXIMUM_OWN_EVENTS = 32, 16

_EVENT = re.compile(r"[a-z][a-z0-9_]{0,39}")


class Context:
    """A source of what the training loop itself reports."""

    table: Table | None = None

    def __init__(self, changed: Callable[[], None]) -> None:
        self.overhead = 0.0  # seconds that probes took
        self._changed = changed
        self._arrivals = Arrivals()
        self._loss = math.nan
        self._scalars: dict[str, float] = {}
        self._progress: dict[str, float] = {}
        self._events = dict.fromkeys(EVENTS, 0.0)  # how often
        self._newest = dict.fromkeys(EVENTS, math.nan)  # and when last
        self._duration = histogram("optwatch.step_duration")
        self._histograms = [(labelled("optwatch.step_duration"), self._duration)]
        self._name()
        self._last: float | None = None
        self._peak = math.nan
        self.read_peak()

    # --- what the training loop calls ------------------------------------------------------------------------------

    def log(self, name: str, value: float | torch.Tensor) -> None:
        """Take the newest value of a scalar. Raises ``ValueError`` or ``TypeError`` if it is none."""
        if name != "loss" and name not in self._scalars:
            if len(self._scalars) == MAXIMUM_SCALARS:
                raise ValueError(f"there are {MAXIMUM_SCALARS} scalars already")
            if not 0 < len(name) <= 64:
                raise ValueError("a name has 1 to 64 characters")
            self._scalars[name] = math.nan
            self._name()
            self._changed()
        self._arrivals.send(value, lambda number: self._take(name, number))

    def _take(self, name: str, number: float) -> None:
        if name == "loss":
            self._loss = number
        else:
            self._scalars[name] = number

    def count(self, name: str, amount: float | torch.Tensor) -> None:
        """Add to what was processed. Raises ``ValueError`` or ``TypeError`` for what cannot be added."""
        if name not in PROGRESS:
            raise ValueError(f"known are {' and '.join(PROGRESS)}")
        if not isinstance(amount, torch.Tensor) and not 0 <= amount < math.inf:
            raise ValueError(f"expected a number of at least 0, got {amount!r}")
        if name not in self._progress:
            self._progress[name] = 0.0
            self._name()
            self._changed()
        self._arrivals.send(amount, lambda number: self._add(name, number))

    def _add(self, name: str, number: float) -> None:
        if number >= 0:  # a counter cannot fall, nor become NaN
            self._progress[name] += number

    def event(self, name: str) -> None:
        """Note that something happened, now. Raises ``ValueError`` for a name that cannot be a label."""
        new = name not in self._events
        if new:
            if not _EVENT.fullmatch(name):
                raise ValueError("expected up to 40 of a-z, 0-9 and _")
            if len(self._events) == len(EVENTS) + MAXIMUM_OWN_EVENTS:
                raise ValueError(f"there are {MAXIMUM_OWN_EVENTS} names besides the known ones already")
            self._events[name] = 0.0
        self._events[name] += 1
        self._newest[name] = time.time()
        if new:
            self._name()
            self._changed()

    def stepped(self) -> None:
        """A step of the loop has ended."""
        now = time.perf_counter()
        if self._last is not None:
            self._duration.observe(now - self._last)
        self._last = now

    def read_peak(self) -> None:
        """Take the process's largest resident memory; ten microseconds, so not for every step."""
        self._peak = peak_bytes()

    def drain(self) -> None:
        """Take what is still on its way, waiting briefly for the device."""
        self._arrivals.drain()

    # --- what the publisher reads ----------------------------------------------------------------------------------

    def _name(self) -> None:
        """Make the series of what there is by now."""
        self._gauge_series = (
            labelled("optwatch.loss"),
            labelled("optwatch.host_memory.peak"),
            *(labelled("optwatch.scalar", ("name", name)) for name in self._scalars),
            *(labelled("optwatch.last_event_timestamp", ("event", name)) for name in self._newest),
        )
        self._counter_series = (
            labelled("optwatch.overhead"),
            *(labelled(f"optwatch.training.{name}") for name in self._progress),
            *(labelled("optwatch.events", ("event", name)) for name in self._events),
        )

    def gauges(self) -> Figures:
        """The newest scalars and the time of the newest events."""
        self._arrivals.poll()
        values = [self._loss, self._peak, *self._scalars.values(), *self._newest.values()]
        return Figures(self._gauge_series, values)

    def counters(self) -> Figures:
        """What was processed, how often what happened, and what watching has cost so far."""
        return Figures(
            self._counter_series, [self.overhead, *self._progress.values(), *self._events.values()]
        )

    def histograms(self) -> Sequence[tuple[Series, Histogram]]:
        """The time of a whole step."""
        return self._histograms

    def infos(self) -> Sequence[Series]:
        """Nothing."""
        return []


def peak_bytes() -> float:
    """The largest resident memory of this process so far, in bytes; NaN where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return math.nan
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return float(found[1]) * 1024 if found else math.nan
