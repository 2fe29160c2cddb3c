"""Steps that a gradient scaler leaves out: ``optimizer.step()`` is then not called, so no hook of it can tell."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Listener(Protocol):
    """What is told of left-out steps: the probe."""

    @property
    def steps(self) -> int:
        """Calls of ``step()`` so far."""

    def skip(self) -> None:
        """A step was left out."""


_listeners: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[weakref.ref[Listener]]] = (
    weakref.WeakKeyDictionary()
)


def listen(optimizer: torch.optim.Optimizer, listener: Listener) -> Callable[[], None]:
    """Tell ``listener`` of each step of ``optimizer`` that a gradient scaler leaves out; returns what ends it."""
    _wrap(torch.amp.GradScaler)
    known = _listeners.setdefault(optimizer, [])
    reference = weakref.ref(listener)
    known.append(reference)

    def forget() -> None:
        if reference in known:
            known.remove(reference)

    return forget


def _wrap(kind: type[torch.amp.GradScaler]) -> None:
    """Look at each ``step`` of scalers of this class from outside, once and for all: they have no hooks."""
    original = kind.step
    if hasattr(original, "_optwatch"):
        return

    @functools.wraps(original)
    def step(self: Any, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        inner = getattr(optimizer, "optimizer", optimizer)  # of a framework's wrapper
        found = [listener for reference in _known(inner) if (listener := reference()) is not None]
        before = [listener.steps for listener in found]
        result = original(self, optimizer, *args, **kwargs)
        for listener, steps in zip(found, before, strict=True):
            if listener.steps == steps:
                listener.skip()
        return result

    step._optwatch = True  # type: ignore[attr-defined]  # noqa: SLF001 - ours
    kind.step = step  # type: ignore[method-assign]


def _known(optimizer: object) -> list[weakref.ref[Listener]]:
    try:
        return list(_listeners.get(optimizer, ()))  # type: ignore[call-overload]
    except TypeError:  # neither hashable nor weakly referable: not ours
        return []
