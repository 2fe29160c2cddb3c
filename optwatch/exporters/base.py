"""What the agent hands to an exporter, and what an exporter is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True)
class HistogramValue:
    """A histogram since the start of the run.

    ``counts[i]`` counts values in (bounds[i-1], bounds[i]], the last one those above every bound.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    sum: float


@dataclass(frozen=True)
class Point:
    """One series at one moment: all labels of the metric, run id and rank included."""

    labels: Mapping[str, str]
    value: float | HistogramValue
    since: float = 0.0  # Unix time from which a counter or histogram counts; 0 = not known


#: The catalogue's dotted name -> its points. A metric without points is absent, never zero. Never changed once made.
Snapshot: TypeAlias = Mapping[str, Sequence[Point]]

#: Something that gives values of its own: the catalogue's name and a point of each.
Values: TypeAlias = Callable[[], Iterable[tuple[str, Point]]]


class Exporter(Protocol):
    """Takes snapshots and shows or sends them. Must not raise for what the other side does."""

    name: str

    def accept(self, snapshot: Snapshot) -> None:
        """Take the newest snapshot."""

    def close(self) -> None:
        """Send what is left, for at most 2 s, and let go of everything."""
