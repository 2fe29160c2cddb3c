"""Making the decision of each step, and remembering those that the host does not know yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from optwatch.kernels.plan import DECISION
from optwatch.optim.binding import Binding
from optwatch.optim.gate import Deferred, Gate, Verdict
from optwatch.optim.sharded import Shards
from optwatch.optim.stats import StatsLayout

NAMED = 8  # parameters that an error names
Grads = Sequence[Sequence[Tensor | None]]
Culprits = Callable[[], list[int]]


@dataclass(frozen=True)
class _Step:
    """A step under way: counted on the host, and perhaps skipped on the device."""

    decision: Tensor  # on the host, once the event has happened
    event: torch.cuda.Event | None
    uncount: Callable[[], None]
    culprits: Culprits | None  # finds the parameters whose gradients are not finite


class Ledger:
    """Counts steps before it is known whether they were taken, and takes the count back once it is known.

    A GPU decides for itself whether it skips a step, and nobody waits to hear of it. So the host counts each step, and
    sends with each what the device needs however many of those under way were skipped. It is ``LIMIT`` steps ahead at
    most: the decision of the step that many before is waited for, which has long been there.
    """

    LIMIT = 8

    def __init__(self) -> None:
        self._open: deque[_Step] = deque()

    def __len__(self) -> int:
        """How many steps are under way."""
        return len(self._open)

    def add(self, decision: Tensor, uncount: Callable[[], None], culprits: Culprits | None) -> None:
        """Note a step that was counted."""
        event = None
        host = decision
        if decision.device.type == "cuda":
            host = torch.empty(decision.shape, dtype=decision.dtype, pin_memory=True)
            host.copy_(decision, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(decision.device))
        self._open.append(_Step(host, event, uncount, culprits))

    def settle(self, at_most: int = LIMIT - 1) -> list[int]:
        """Take back what is known to have been skipped; waits until ``at_most`` steps are under way.

        Returns the indices of the parameters whose gradients were not finite and should not have been.
        """
        found: list[int] = []
        while self._open and (len(self._open) > at_most or self._known(self._open[0])):
            step = self._open.popleft()
            if step.event is not None:
                step.event.synchronize()
            if step.decision[DECISION.index("skipped")]:
                step.uncount()
                found += step.culprits() if step.culprits else []
        return found

    @staticmethod
    def _known(step: _Step) -> bool:
        return step.event is None or step.event.query()


class Decisions:
    """The decisions of an optimizer, step after step."""

    def __init__(self) -> None:
        self._ledger = Ledger()
        self._culprits: list[int] = []

    def decide(
        self, gate: Gate, bindings: Sequence[Binding], shards: Shards, grads: Grads, counts: bool
    ) -> tuple[Tensor | None, Sequence[Verdict | Deferred | None]]:
        """How a step is to be taken, from all gradients: ``DECISION``, and what to tell each plan.

        Of parameters that are cut into shards every rank has a piece: then all of them add up and decide the same.

        Where every plan decides on its device the host is told later, else it reads the decision at once, and waits for
        it if it lies on a GPU. A step that does not count (``counts``) leaves no trace if it is skipped.
        """
        if not gate.closed or not bindings:
            self.settle(0)
            return None, [None] * len(bindings)
        sums = [binding.sum_gradients(given) for binding, given in zip(bindings, grads, strict=True)]
        whole = shards.add(sums)
        decision = gate.decide(whole)
        culprits = None
        if gate.mode == "raise" and gate.found_inf is None:
            culprits = partial(_nonfinite, [binding.layout for binding in bindings], whole)
        if not all(binding.defers for binding in bindings):
            self.settle(0)
            verdicts = gate.verdicts(decision, sums)
            if verdicts[0].skip and culprits:
                self._culprits = culprits()
            return decision, verdicts
        under_way = len(self._ledger)
        if gate.may_skip and counts and (culprits or any(b.counted_by_host for b in bindings)):
            self._ledger.add(decision, partial(_uncount, bindings, grads), culprits)
        return decision, [Deferred(decision, gate.mode == "zero", rows, under_way) for rows in sums]

    def settle(self, at_most: int = Ledger.LIMIT - 1) -> None:
        """See :meth:`Ledger.settle`."""
        self._culprits += self._ledger.settle(at_most)

    def check(self, name: Callable[[int], str]) -> None:
        """Raise the error of ``nonfinite="raise"`` if a step is known to have been skipped since the last call."""
        self.settle()
        if self._culprits:
            culprits, self._culprits = sorted(set(self._culprits)), []
            raise _error([name(index) for index in culprits])


def _uncount(bindings: Sequence[Binding], grads: Grads) -> None:
    """Take back the count of a step that had these gradients."""
    for binding, given in zip(bindings, grads, strict=True):
        binding.uncount(np.array([grad is not None for grad in given]))


def _nonfinite(layouts: Sequence[StatsLayout], sums: Sequence[Tensor]) -> list[int]:
    """The indices of the parameters whose ``GRADIENT_SUMS`` count elements that are not finite."""
    pairs = zip(layouts, sums, strict=True)
    return sorted(
        index
        for layout, rows in pairs
        for index, count in zip(layout.indices, rows[:, 1].tolist(), strict=True)
        if count
    )


def _error(names: Sequence[str]) -> RuntimeError:
    """The error of ``nonfinite="raise"``."""
    shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    return RuntimeError(
        f"the gradients of the last step were not finite, and it was skipped: {shown}; "
        "weights and state are those of before it, and the next call of step() goes on"
    )
