"""The numbers that a plan gets in each step: how often each tensor was stepped, and from it scalars and random keys.

A step of a large model evicts all that the interpreter had in its caches, so each operation of numpy's costs tens of
microseconds here, a few percent of the step of an optimizer that moves little memory. What most tensors have in common
is therefore computed once, in plain numbers, and what does not change is kept.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from optwatch.kernels import PlanSpec
from optwatch.kernels.plan import Keys, Scalars
from optwatch.kernels.random import added_to, keys_at, streams

Groups = Sequence[Mapping[str, Any]]


class Counts:
    """How often each tensor was stepped: every ``state["step"]`` becomes a view of one fp32 vector."""

    def __init__(self, states: Sequence[MutableMapping[str, Any]]) -> None:
        vector = torch.tensor([float(state["step"]) for state in states], dtype=torch.float32)
        for i, state in enumerate(states):
            state["step"] = vector[i]
        self.vector: NDArray[np.float32] = vector.numpy()
        self._bytes = self.vector.data.cast("B")
        self._seen, self._common = b"", 0.0

    @property
    def common(self) -> float | None:
        """The count that all tensors have; None if they differ. Whoever has a state may have written to it."""
        seen = bytes(self._bytes)
        if seen != self._seen:
            if seen != seen[:4] * len(self.vector):
                return None
            self._seen, self._common = seen, float(self.vector[0])
        return self._common

    def add(self, absent: Sequence[bool] | None) -> None:
        """Count a step of every tensor that is not ``absent``; None: of all."""
        common = None if absent is not None else self.common
        if absent is not None:
            self.vector[np.logical_not(absent)] += 1
        elif common is None:
            self.vector += 1
        else:
            one = struct.pack("f", common + 1)
            (self._common,) = struct.unpack("f", one)
            self._seen = one * len(self.vector)
            self._bytes[:] = self._seen

    def take_back(self, stepped: NDArray[np.bool_]) -> None:
        """Count a step less of the tensors that were ``stepped``."""
        self.vector -= stepped


class Inputs:
    """Scalars and random keys of the tensors of one plan."""

    def __init__(
        self, spec: PlanSpec, counts: Counts, group_of: NDArray[np.intp], parameters: NDArray[np.uint64],
        first: NDArray[np.uint64],
    ) -> None:  # fmt: skip
        self._spec, self._counts, self._group_of = spec, counts, group_of
        found, self._member = np.unique(group_of, return_inverse=True)
        self._groups: list[int] = found.tolist()
        self._parameters, self._added = parameters, added_to(first)
        self._seeds: list[int] | None = None  # that the streams come from
        self._stochastic = spec.stochastic
        self._no_keys = np.zeros((len(parameters), len(spec.codecs) + 1, 2), np.uint32)
        self._scalars = np.empty((len(parameters), len(spec.rule.scalars)), np.float32)
        self._flat = self._scalars.reshape(-1).data

    def make(
        self, groups: Groups, options: Sequence[str], aside: Mapping[str, float], fewer: int = 0
    ) -> tuple[Scalars, Keys]:
        """Those of a step; of one that was counted ``fewer`` times less. Until the next step they are the caller's.

        Options given ``aside`` are added, and random numbers are then others.
        """
        common = self._counts.common
        if common is None:
            steps = np.maximum(self._counts.vector.astype(np.float64) - fewer, 0)
            pairs, row_of = np.unique(np.stack([steps, self._group_of], 1), axis=0, return_inverse=True)
            rows = [self._row(groups[int(group)], options, aside, step) for step, group in pairs.tolist()]
            return _spread(rows, row_of.reshape(-1)), self._keys(groups, aside, steps)
        step = max(common - fewer, 0.0)
        keys = self._keys(groups, aside, step)
        rows = [self._row(groups[group], options, aside, step) for group in self._groups]
        if len(rows) > 1 or fewer:
            return _spread(rows, self._member), keys
        self._flat[:] = rows[0] * len(self._scalars)
        return self._scalars, keys

    def _row(
        self, group: Mapping[str, Any], options: Sequence[str], aside: Mapping[str, float], step: float
    ) -> array[float]:
        """The scalars of the tensors in a group. Raises a ``ValueError`` for options that there is no step with."""
        try:
            values: dict[str, Any] = {name: _number(group[name]) for name in options}
            if aside:
                values.update(aside)
            return array("f", self._spec.rule.prepare(values, max(step, 1.0)))
        except (ArithmeticError, TypeError, ValueError) as error:
            given = ", ".join(f"{name}={group[name]!r}" for name in options)
            raise ValueError(
                f"no step can be taken with {given}: {error}; an option was changed after construction, set it right"
            ) from error

    def _keys(self, groups: Groups, aside: Mapping[str, float], steps: float | NDArray[np.float64]) -> Keys:
        if not self._stochastic:
            return self._no_keys
        seeds = [group["seed"] for group in groups]
        if aside:
            return keys_at(self._streams_of(seeds, aside=True), steps, self._added)
        if self._seeds != seeds:
            self._seeds, self._streams = seeds, self._streams_of(seeds)
        return keys_at(self._streams, steps, self._added)

    def _streams_of(self, seeds: Sequence[int], aside: bool = False) -> NDArray[np.uint64]:
        numbers = np.array([seed % 2**64 for seed in seeds], np.uint64)[self._group_of]
        return streams(~numbers if aside else numbers, self._parameters, self._no_keys.shape[1])


def _spread(rows: Sequence[array[float]], row_of: NDArray[np.intp]) -> Scalars:
    """The row of each tensor, as fp32 ``[n, len(row)]``."""
    spread: Scalars = np.array(rows, np.float32)[row_of]
    return spread


def _number(option: Any) -> float | tuple[float, ...]:
    """An option as a plain number, NaN for None; torch.optim takes a rate in a tensor of one element, of any shape."""
    if type(option) is float:
        return option
    if isinstance(option, tuple | list):
        return tuple(float(part) for part in option)
    return math.nan if option is None else float(option)
