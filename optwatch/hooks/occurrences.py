"""Run events that an optimizer gives away by itself: nobody has to report them.

========================  =========================================================================================
``checkpoint``            ``state_dict()`` was called
``resume``                ``load_state_dict()`` was called
``format_conversion``     after it a slot is stored in other dtypes than in the checkpoint: asked for, or silently
``learning_rate_change``  a rate changed that had stood for ten steps, or it changed more than tenfold at once:
                          not every step of a schedule
``skipped_step``          the step updated nothing: no gradients, or a loss scaler found them not finite
========================  =========================================================================================
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from optwatch.hooks.arrivals import Arrivals
from optwatch.hooks.probe import Guard, Probe
from optwatch.hooks.scaler import listen
from optwatch.optim import Optimizer

#: A learning rate that changes more often follows a schedule, and its steps are no events.
STOOD = 10
#: A rate that rises or falls by more than this factor at once is an event even so: a restart of the schedule.
JUMP = 10.0

Event = Callable[[str], None]


class Occurrences:
    """Listens to one optimizer and tells ``event`` what it did."""

    def __init__(self, optimizer: torch.optim.Optimizer, probe: Probe, event: Event, guard: Guard) -> None:
        self._probe, self._event = weakref.proxy(probe), event
        self._saved: Mapping[str, set[torch.dtype]] = {}
        self._conversions: int | None = None
        self._rates: list[_Rate] = []
        self._skipped = probe.skipped
        self._arrivals = Arrivals()
        self._unhook: list[Callable[[], None]] = [
            optimizer.register_state_dict_post_hook(_without_result(guard(self._checkpoint))).remove,
            optimizer.register_load_state_dict_pre_hook(_without_result(guard(self._loading))).remove,
            optimizer.register_load_state_dict_post_hook(guard(self._loaded)).remove,
            listen(optimizer, probe),
        ]
        probe.then = self._stepped

    def close(self) -> None:
        """Hear no more."""
        for unhook in self._unhook:
            unhook()
        with contextlib.suppress(ReferenceError):  # the probe is gone
            self._probe.then = None

    def _checkpoint(self, *_: object) -> None:
        self._event("checkpoint")

    def _loading(self, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
        self._conversions = conversions(optimizer)
        self._saved = slot_dtypes(state_dict.get("state", {}).values())

    def _loaded(self, optimizer: torch.optim.Optimizer) -> None:
        saved, self._saved = self._saved, {}
        loaded = slot_dtypes(optimizer.state.values())
        self._event("resume")
        known = conversions(optimizer)
        if known is None:
            converted = any(loaded[slot] != dtypes for slot, dtypes in saved.items())
        else:
            converted = known != self._conversions
        if converted:
            self._event("format_conversion")

    def _stepped(self, optimizer: torch.optim.Optimizer, probe: Probe) -> None:
        self._arrivals.poll()
        found = getattr(optimizer, "found_inf", None)  # a scaler's, for a kernel that skips by itself
        if isinstance(found, torch.Tensor) and not isinstance(
            optimizer, Optimizer
        ):  # which tell in their rows
            self._arrivals.send(found, self._scaled)
        if probe.skipped > self._skipped:
            self._skipped = probe.skipped
            self._event("skipped_step")
        if self._rate_jumped(probe.rates):
            self._event("learning_rate_change")

    def _scaled(self, found: float) -> None:
        if found:
            self._probe.skip()

    def _rate_jumped(self, rates: Sequence[float]) -> bool:
        if len(rates) != len(self._rates):
            self._rates = [_Rate(value) for value in rates]
        jumped = False
        for rate, value in zip(self._rates, rates, strict=True):
            jumped |= rate.changes(value)
        return jumped


class _Rate:
    """A learning rate, and for how many steps it has stood."""

    __slots__ = ("stood", "value")

    def __init__(self, value: float) -> None:
        self.value, self.stood = value, 0

    def changes(self, value: float) -> bool:
        """Whether going on to ``value`` is an event."""
        if value == self.value or math.isnan(value):
            self.stood += 1
            return False
        stood, self.stood = self.stood, 1
        low, high = sorted((abs(self.value), abs(value)))
        self.value = value
        return stood >= STOOD or 0 < low < high / JUMP


def conversions(optimizer: torch.optim.Optimizer) -> int | None:
    """How many slots an optimizer has converted in loading; None for one that does not count."""
    return getattr(optimizer, "state_conversions", None)


def slot_dtypes(states: Iterable[object]) -> Mapping[str, set[torch.dtype]]:
    """The dtypes of the tensors behind each key of these state dicts, step counters left out."""
    found: dict[str, set[torch.dtype]] = defaultdict(set)
    for state in states:
        for key, value in state.items() if isinstance(state, Mapping) else ():
            if isinstance(value, torch.Tensor) and key != "step":
                found[key].add(value.dtype)
    return found


def _without_result(function: Callable[..., None]) -> Callable[..., Any]:
    """A hook of which torch would take a result for another state dict."""

    def call(*args: object) -> None:
        function(*args)

    return call
