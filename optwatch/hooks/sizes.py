"""The bytes of what an optimizer holds, as series."""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from optwatch.board import Series
from optwatch.hooks.figures import NONE, Figures, labelled, renewed
from optwatch.optim import Optimizer
from optwatch.optim.count import PLAIN, count_bytes, state_leaves, storages
from optwatch.optim.sharded import local

SeriesValues = list[tuple[Series, float]]
#: Gives the slot that each key of a parameter's state belongs to, where that is not the key itself.
SlotNames = Callable[[torch.optim.Optimizer], Mapping[str, str]]
_Glance = tuple[list[int], list[int], list[torch.dtype | None]]
_LAYOUT = operator.attrgetter("layout")


class Sizes:
    """Counts the bytes of one optimizer's state, parameters and gradients, each when they can have changed."""

    def __init__(self, name: str, slots: SlotNames) -> None:
        self.state: SeriesValues = []
        self.tensors: SeriesValues = []
        self.gradients: SeriesValues = []
        self._figures = NONE
        self._name, self._slots = name, slots
        self._scalars: frozenset[Any] = frozenset()  # keys of numbers
        self._glanced: _Glance | None = None
        self._seen: list[tuple[int, int, int]] = []

    @property
    def figures(self) -> Figures:
        """All of them."""
        return self._figures

    def read(self, optimizer: torch.optim.Optimizer, full: bool, again: bool = False) -> bool:
        """Count what has changed; whether there are other series now.

        Of an optimizer that is not ours every step looks whether the state is still the same tensors; ours says so
        itself, by other layouts (``again``).
        """
        own = isinstance(optimizer, Optimizer)
        anew = again or not self.state if own else again or self._changed(optimizer)
        if anew:
            self.state = state_series(optimizer, self._name, self._slots)
        if full or again or (anew and not own):
            self.tensors = tensor_series(optimizer, self._name, ("parameter", "parameters"))
            self.gradients = tensor_series(optimizer, self._name, ("gradient",))
        elif not anew:
            return False
        before = self._figures.series
        self._figures = renewed(self._figures, self.state + self.tensors + self.gradients)
        return self._figures.series is not before

    def _changed(self, optimizer: torch.optim.Optimizer) -> bool:
        state = optimizer.state
        if self._glanced is not None and _glance(state, self._scalars) == self._glanced:
            return False
        self._scalars = _scalar_keys(state)
        self._glanced = _glance(state, self._scalars)
        seen = [
            (0, 0, t.nbytes)
            if key in self._scalars
            else (id(t), t.data_ptr() if t.layout == torch.strided else 0, t.nbytes)
            for key, t in state_leaves(state)
        ]
        changed, self._seen = seen != self._seen, seen
        return changed


def _is_scalar(value: object) -> bool:
    """Whether this is a number, or a tensor that holds one."""
    return isinstance(value, PLAIN) or (type(value) is torch.Tensor and value.numel() == 1)


def _scalar_keys(state: Mapping[Any, Any]) -> frozenset[Any]:
    """The keys under which the parameters' dicts have nothing but numbers, which may be others in each step."""
    entries = [entry for kept in state.values() if isinstance(kept, dict) for entry in kept.items()]
    return frozenset(key for key, _ in entries) - {key for key, value in entries if not _is_scalar(value)}


def _glance(state: Mapping[Any, Any], scalars: frozenset[Any]) -> _Glance | None:
    """Identities and addresses of the tensors in ``state``, and types of the numbers under the keys ``scalars``.

    It takes a fraction of the time of looking closely. A tensor that becomes larger or of another type gets other
    memory. None where that does not tell: where something besides plain strided tensors and numbers is kept.
    """
    if not all(isinstance(kept, dict) for kept in state.values()):
        return None
    tensors = [value for kept in state.values() for key, value in kept.items() if key not in scalars]
    numbers = [value for kept in state.values() for key, value in kept.items() if key in scalars]
    if set(map(type, tensors)) - {torch.Tensor} or set(map(_LAYOUT, tensors)) - {torch.strided}:
        return None
    if not all(map(_is_scalar, numbers)):
        return None
    types = [value.dtype if isinstance(value, torch.Tensor) else None for value in numbers]
    return list(map(id, tensors)), list(map(torch.Tensor.data_ptr, tensors)), types


def state_series(optimizer: torch.optim.Optimizer, name: str, slots: SlotNames) -> SeriesValues:
    """The bytes of the optimizer's state, as found and, for optwatch's own, as asked for."""
    if isinstance(optimizer, Optimizer):
        actual, expected = optimizer.state_bytes(), optimizer.expected_state_bytes()
    else:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        leaves = state_leaves(optimizer.state)
        actual, expected = count_bytes(leaves, slots(optimizer), storages(params)), {}
    return [
        (
            labelled(f"optwatch.optimizer.{metric}", ("optimizer", name), *kind._asdict().items()),
            float(number),
        )
        for metric, counted in (("state", actual), ("state_expected", expected))
        for kind, number in sorted(counted.items())
    ]


def tensor_series(optimizer: torch.optim.Optimizer, name: str, metrics: Sequence[str]) -> SeriesValues:
    """Of parameters and gradients the bytes (``parameter``, ``gradient``) and the elements (``parameters``)."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    totals: dict[tuple[str, torch.dtype, torch.device], int] = defaultdict(int)
    for metric in metrics:
        tensors = (
            [param.grad for param in params if param.grad is not None] if metric == "gradient" else params
        )
        size = torch.Tensor.numel if metric == "parameters" else operator.attrgetter("nbytes")
        for (dtype, device), alike in itertools.groupby(
            map(local, tensors), operator.attrgetter("dtype", "device")
        ):
            totals[metric, dtype, device] += sum(map(size, alike))
    series = [
        (_described(f"optwatch.{metric}", name, dtype, device), float(number))
        for (metric, dtype, device), number in totals.items()
    ]
    return sorted(series, key=lambda pair: pair[0].key)


def _described(metric: str, optimizer: str, dtype: torch.dtype, device: torch.device) -> Series:
    labels = {"optimizer": optimizer, "dtype": str(dtype).removeprefix("torch."), "device": str(device)}
    return labelled(metric, *labels.items())
