"""Series with their values, as sources hand them to the publisher in each step."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from optwatch.board import Histogram, Series
from optwatch.metrics.catalogue import CATALOGUE


class Figures(NamedTuple):
    """Series and the value of each.

    ``series`` is the same object for as long as they are the same series: a step then neither makes nor compares any.
    """

    series: tuple[Series, ...]
    values: Sequence[float]


NONE = Figures((), ())


def figures(pairs: Iterable[tuple[Series, float]]) -> Figures:
    """Figures of other series than before."""
    found = list(pairs)
    return Figures(tuple(series for series, _ in found), [value for _, value in found])


def renewed(known: Figures, pairs: Iterable[tuple[Series, float]]) -> Figures:
    """``pairs`` as figures, of the very series that are ``known`` if they are equal to those."""
    found = figures(pairs)
    return Figures(known.series, found.values) if found.series == known.series else found


class Joined:
    """Figures of several origins as one."""

    def __init__(self) -> None:
        self._given: list[tuple[Series, ...]] = []
        self._series: tuple[Series, ...] = ()

    def of(self, *parts: Figures) -> Figures:
        """All of ``parts``, one after another."""
        given = [part.series for part in parts]
        if not same(given, self._given):
            self._given, self._series = given, tuple(itertools.chain(*given))
        return Figures(self._series, [value for part in parts for value in part.values])


def same(ones: Sequence[object], others: Sequence[object]) -> bool:
    """Whether these are the very same objects."""
    return len(ones) == len(others) and all(map(operator.is_, ones, others))


@functools.lru_cache(maxsize=4096)
def labelled(name: str, *labels: tuple[str, str]) -> Series:
    """The series of this name and these labels: the same object each time, so that a step makes none."""
    return Series(name, dict(labels))


def histogram(name: str) -> Histogram:
    """An empty histogram with the catalogue's buckets of metric ``name``."""
    return Histogram(CATALOGUE[name].buckets)
