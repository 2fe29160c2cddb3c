"""What an update rule is: the mathematics of one optimizer, on fp32 values, without storage or devices."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from optwatch.codecs.base import Kind


@dataclass(frozen=True)
class Slot:
    """One tensor that a rule keeps for each parameter, named as torch.optim names it."""

    name: str
    kind: Kind


class Rule(abc.ABC):
    """An elementwise update rule: :meth:`step` to new state and update, :meth:`apply` to the new weight.

    :meth:`update` computes the update once more from the new state. A step with full statistics calls it for the
    exact and for the stored state, which is how the error that quantisation causes is measured.
    """

    name: str
    slots: tuple[Slot, ...]
    #: Names of the numbers that the elementwise mathematics needs for a tensor, in the order kernels receive them.
    scalars: tuple[str, ...]

    @abc.abstractmethod
    def prepare(
        self, options: Mapping[str, NDArray[np.float64]], step: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """The scalars of ``n`` tensors as ``[n, len(scalars)]``.

        ``options`` holds each hyperparameter of the parameter groups and ``step`` the number of this step, from 1,
        as arrays ``[n]``, or ``[n, k]`` for a tuple of k. Everything that needs float64 is done here.
        """

    @abc.abstractmethod
    def step(
        self, state: Sequence[Tensor], grad: Tensor, weight: Tensor, h: Mapping[str, float]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The exact new state, slot by slot, and what is subtracted from the weight; ``h`` holds the scalars by name."""

    @abc.abstractmethod
    def update(self, state: Sequence[Tensor], grad: Tensor, h: Mapping[str, float]) -> Tensor:
        """What is subtracted from the weight, as far as it follows from the new ``state``."""

    @abc.abstractmethod
    def apply(self, weight: Tensor, update: Tensor, h: Mapping[str, float]) -> Tensor:
        """The new weight, with weight decay."""
