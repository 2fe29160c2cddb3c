"""What watches an optimizer besides its own kernel.

Each part ends alone: an error in it is counted, said once, and costs nothing but the statistics that needed it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from optwatch.hooks.adapters import ADAPTERS, UNKNOWN, Adapter
from optwatch.hooks.blocks import ABSENT, Blocks
from optwatch.hooks.foreign import Foreign
from optwatch.hooks.tabulation import Naming, Replicas, Tabulation
from optwatch.metrics.fields import ESTIMATE, SHADOW
from optwatch.optim import Optimizer, PlanStats, StatsLayout, StepStats

#: The share of blocks that a foreign optimizer's quantisation error is estimated from.
ESTIMATED = 0.01

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What is computed once more on sampled blocks."""

    shadow: float = 0.0  # share of the blocks that are shadowed
    what_if: tuple[str, ...] = ()  # other formats to compare on the same blocks


NO_SAMPLING = Sampling()


@dataclasses.dataclass(eq=False)
class _Sampled:
    """Blocks, and one table for each format that is compared on them."""

    blocks: Blocks
    tabulations: tuple[Tabulation, ...]
    layouts: tuple[tuple[StatsLayout, ...], ...] = ()  # of each table, one for each batch
    of: tuple[StatsLayout, ...] = ()  # the blocks' own, which these are made from


class Parts:
    """The parts of one optimizer's watch. ``sources`` are tables for the publisher."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, name: str, naming: Naming, replicas: Replicas,
        sampling: Sampling, warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.errors = 0
        self._name, self._warn = name, warn
        self.adapter = self._find(optimizer)
        self._names: Mapping[str, str] | None = None
        own = isinstance(optimizer, Optimizer)
        self._foreign = None if own else Foreign(self.adapter)
        self._sampled: list[_Sampled] = []

        def add(family: str, count: int, blocks: Blocks) -> None:
            tables = tuple(Tabulation(name, naming, replicas, family) for _ in range(count))
            self._sampled.append(_Sampled(blocks, tables))

        if not own:
            add(ESTIMATE, 1, Blocks(self.adapter, ESTIMATED, keep=False))
        if sampling.shadow:
            shadow = Blocks(self.adapter, sampling.shadow, keep=True, what_if=sampling.what_if)
            add(SHADOW, 1 + len(sampling.what_if), shadow)
        self.sources = [tabulation for sampled in self._sampled for tabulation in sampled.tabulations]

    def _find(self, optimizer: torch.optim.Optimizer) -> Adapter:
        """The adapter that knows the optimizer; one that fails in looking at it does not."""
        for adapter in ADAPTERS:
            try:
                if adapter.knows(optimizer):
                    return adapter
            except Exception as error:
                self._failed("statistics", adapter, error)
        return UNKNOWN

    def slot_of(self, optimizer: torch.optim.Optimizer) -> Mapping[str, str]:
        """The slot that each key of a parameter's state belongs to, as far as the adapter can tell."""
        if self._names is None:
            try:
                self._names = self.adapter.slot_of(optimizer)
            except Exception as error:
                self._failed("names of slots", self.adapter, error)
                self._names = {}
        return self._names

    @property
    def absent(self) -> tuple[str, ...]:
        """Fields of the main rows that nobody can sum."""
        return self._foreign.absent if self._foreign is not None else ()

    @property
    def sampled(self) -> tuple[str, ...]:
        """Cheap fields of the main rows that only full rows have."""
        return self._foreign.sampled if self._foreign is not None else ()

    def before(self, optimizer: torch.optim.Optimizer, full: bool) -> None:
        """A step begins; ``full``: it is a sampled one."""
        for sampled in list(self._sampled):
            self._attempt(sampled, sampled.blocks.before, optimizer, full)

    def after(
        self, optimizer: torch.optim.Optimizer, stats: StepStats | None, step: int, full: bool
    ) -> tuple[StepStats | None, bool]:
        """The statistics of the step that has ended, with the rows of sampled blocks; whether a table changed."""
        if self._foreign is None and not self._sampled:
            return stats, False
        if self._foreign is not None:
            stats = self._attempt(self._foreign, self._foreign.after, optimizer, step, full)
        changed, rows = False, list[PlanStats]()
        decision = stats.decision if stats is not None else None
        for sampled in list(self._sampled):
            made = self._attempt(sampled, sampled.blocks.after, optimizer, full, decision)
            if made and stats is not None:
                changed |= self._tabulate(sampled, optimizer)
                rows += [
                    PlanStats(layouts[batch], values)
                    for batch, of_formats in enumerate(made)
                    for layouts, values in zip(sampled.layouts, of_formats, strict=True)
                ]
        if stats is not None and rows:
            stats = dataclasses.replace(stats, plans=(*stats.plans, *rows))
        return stats, changed

    def end_sampling(self) -> bool:
        """Take blocks no more, whose copies would miss the steps that a graph replays; whether any were taken."""
        ended, self._sampled = self._sampled, []
        for sampled in ended:
            for tabulation in sampled.tabulations:
                tabulation.clear()
        if ended:
            self._warn(
                f"errors of stored state of {self._name} are no longer taken: a CUDA graph replays its steps"
            )
        return bool(ended)

    def _tabulate(self, sampled: _Sampled, optimizer: torch.optim.Optimizer) -> bool:
        blocks = sampled.blocks
        if blocks.layouts == sampled.of:
            return False
        sampled.of = blocks.layouts
        sampled.layouts = tuple(
            tuple(dataclasses.replace(layout) for layout in blocks.layouts) for _ in blocks.formats
        )
        for tabulation, layouts, name in zip(
            sampled.tabulations, sampled.layouts, blocks.formats, strict=True
        ):
            labels = {"format": name} if blocks.keep else {}
            tabulation.lay_out(layouts, optimizer, labels, ABSENT, ("update_sq",))
        return True

    def _attempt(self, part: Foreign | _Sampled, function: Callable[..., T], *arguments: object) -> T | None:
        """What ``function`` gives; None, and the end of ``part``, if it raises."""
        try:
            return function(*arguments)
        except Exception as error:  # of whatever kind: the rest goes on
            if isinstance(part, Foreign):
                self._foreign = None
            else:
                self._sampled.remove(part)
                for tabulation in part.tabulations:
                    tabulation.clear()
            what = "statistics" if isinstance(part, Foreign) else "errors of stored state"
            self._failed(what, self.adapter, error)
            return None

    def _failed(self, what: str, adapter: Adapter, error: Exception) -> None:
        """Count an error in an adapter, and say what it costs."""
        self.errors += 1
        self._warn(
            f"{what} of {self._name} are no longer taken, bytes and durations are: the adapter for {adapter.name} "
            f"raised {type(error).__name__}: {error}"
        )
