"""What an update rule is: the mathematics of one optimizer, on fp32 values, without storage or devices."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from optwatch.codecs.base import Kind

#: A float of one tensor, or the numbers of several at once: an array of numpy's on the host, or a tensor where the
#: device computes them.
Numbers: TypeAlias = Any


class Floats:
    """The functions of numpy and torch that rules use, of floats: a step has too little to compute for arrays."""

    sqrt, exp = math.sqrt, math.exp

    @staticmethod
    def where(condition: bool, one: float, other: float) -> float:
        """``one`` where the condition holds."""
        return one if condition else other

    @staticmethod
    def log(x: float) -> float:
        """The natural logarithm; -inf of 0."""
        return math.log(x) if x else -math.inf

    @staticmethod
    def reciprocal(x: float) -> float:
        """1 / x; infinite for 0."""
        return 1 / x if x else math.copysign(math.inf, x)


def library(values: Numbers) -> Any:
    """What computes with ``values``: :class:`Floats`, numpy or torch."""
    if isinstance(values, float):
        return Floats
    return torch if isinstance(values, Tensor) else np


def parts(option: Numbers) -> Sequence[Numbers]:
    """The parts of an option that is a tuple."""
    return option if isinstance(option, tuple) else option.T


@dataclass(frozen=True)
class Slot:
    """One tensor that a rule keeps for each parameter, named as torch.optim names it."""

    name: str
    kind: Kind
    initial: str | None = None  # the option of a parameter group that the slot starts at; zero without one


class Rule(abc.ABC):
    """An elementwise update rule: :meth:`step` to new state and update, :meth:`apply` to the new weight.

    :meth:`update` computes the update once more from the new state. A step with full statistics calls it for the
    exact and for the stored state, which is how the error that quantisation causes is measured.
    """

    name: str
    slots: tuple[Slot, ...]
    #: Whether torch.optim keeps no ``step`` for this rule, so that its checkpoints may lack one.
    stepless: bool = False
    #: Names of the numbers that the elementwise mathematics needs for a tensor, in the order kernels receive them.
    scalars: tuple[str, ...]
    #: What the rule takes norms of over whole tensors before its step, see :meth:`measure`; most rules take none.
    norms: tuple[str, ...] = ()

    @property
    def compares_moment(self) -> bool:
        """Whether the first slot is a first moment, whose angle to the gradient means something."""
        return bool(self.slots) and self.slots[0].kind is Kind.SIGNED

    def __repr__(self) -> str:
        """The rule's name."""
        return self.name

    @abc.abstractmethod
    def prepare(self, options: Mapping[str, Numbers], step: Numbers) -> Numbers:
        """The scalars of a tensor in their order, or of ``n`` tensors as fp32 ``[n, len(scalars)]``.

        ``options`` holds each hyperparameter of the parameter groups and ``step`` the number of this step, from 1.
        Everything that needs float64 is done here. All are floats, and :func:`parts` gives those of a tuple; or all are
        float64 ``[n]``, and ``[n, k]`` for a tuple of k: arrays of numpy's, or tensors on one device, where nothing
        here may wait for it. :func:`library` has the functions for each.
        """

    @abc.abstractmethod
    def step(
        self, state: Sequence[Tensor], grad: Tensor, weight: Tensor, h: Mapping[str, float]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The exact new state, slot by slot, and what is subtracted from the weight; ``h``: the scalars by name."""

    @abc.abstractmethod
    def update(self, state: Sequence[Tensor], grad: Tensor, h: Mapping[str, float]) -> Tensor:
        """What is subtracted from the weight, as far as it follows from the new ``state``.

        ``grad`` is the gradient as it was given: a rule with L2 decay that needs the gradient here goes without the
        decay's part of it.
        """

    @abc.abstractmethod
    def apply(self, weight: Tensor, update: Tensor, h: Mapping[str, float]) -> Tensor:
        """The new weight, with weight decay."""

    def measure(
        self, state: Sequence[Tensor], grad: Tensor, weight: Tensor, h: Mapping[str, float]
    ) -> tuple[Tensor, ...]:
        """The values that ``norms`` names, from the state before the step.

        A first pass reads everything that the step will read, sums the squares of these values over each tensor and
        stores nothing; :meth:`conclude` turns the sums into scalars.
        """
        raise NotImplementedError(f"the rule {self.name!r} takes no norms")

    def conclude(self, h: Mapping[str, Tensor], sums: Sequence[Tensor]) -> dict[str, Tensor]:
        """The scalars that follow from the sums of squares of ``norms``, by name; the step gets them in place of ``h``.

        All are arrays ``[n]`` over tensors. Nothing here may wait for the device that they lie on.
        """
        return {}

    def columns(self, step: Numbers, **values: Numbers) -> Numbers:
        """What :meth:`prepare` returns at this step, or these, from the scalars' names: single numbers or ``[n]``."""
        if isinstance(step, float):
            return [values[name] for name in self.scalars]
        shape = len(step), len(self.scalars)
        on_device = isinstance(step, Tensor)
        packed = step.new_empty(shape, dtype=torch.float32) if on_device else np.empty(shape, np.float32)
        for column, name in enumerate(self.scalars):
            packed[:, column] = values[name]
        return packed


class DecoupledDecay(Rule):
    """A rule that shrinks the weight by its scalar ``decay`` before the update."""

    def apply(self, weight: Tensor, update: Tensor, h: Mapping[str, float]) -> Tensor:
        """Decay first, as torch.optim does."""
        return weight * h["decay"] - update


class CoupledDecay(Rule):
    """A rule whose weight decay is a part of the gradient (L2), by its scalars ``grad_scale`` and ``l2``."""

    @staticmethod
    def decayed(grad: Tensor, weight: Tensor, h: Mapping[str, float]) -> Tensor:
        """The gradient with its sign (``maximize``), and then the decay's."""
        return grad * h["grad_scale"] + weight * h["l2"]

    def apply(self, weight: Tensor, update: Tensor, h: Mapping[str, float]) -> Tensor:
        """The decay is in the update."""
        return weight - update
