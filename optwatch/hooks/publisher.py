"""One board, fed by several probes: it turns their series into a schema and their values into records."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from optwatch.board import (
    BoardWriter,
    Histogram,
    HistogramSeries,
    Schema,
    Series,
    Table,
    apply_folds,
    fit,
)
from optwatch.board.writer import Values
from optwatch.metrics.catalogue import CATALOGUE


class Source(Protocol):
    """Something with values to publish: the probe of an optimizer, or the training loop itself.

    The lists of series may change; the source then calls :meth:`Publisher.changed`.
    """

    @property
    def table(self) -> Table | None:
        """What its rows describe; None if it has none."""

    def gauges(self) -> Sequence[tuple[Series, float]]:
        """Each gauge with its value of now; NaN where there is none."""

    def counters(self) -> Sequence[tuple[Series, float]]:
        """Each counter with its total so far."""

    def histograms(self) -> Sequence[tuple[Series, Histogram]]:
        """Each histogram with its counts so far."""

    def infos(self) -> Sequence[Series]:
        """Facts, as labels."""


class Publisher:
    """Writes the values of its sources to the rank's board, one record a step."""

    def __init__(self, directory: str | None, run: Mapping[str, Any]) -> None:
        self._run, self._directory = dict(run), directory
        self._sources: list[Source] = []
        self._writer: BoardWriter | None = None
        self._stale = True
        self._newest = -1, time.time()  # step and its time
        self._guard = threading.RLock()  # a checkpoint may be written by another thread

    def add(self, source: Source) -> None:
        """Publish what ``source`` has from the next record on."""
        self._sources.append(source)
        self._stale = True

    def remove(self, source: Source) -> None:
        """Publish it no more."""
        if source in self._sources:
            self._sources.remove(source)
            self._stale = True

    def changed(self) -> None:
        """The series of a source are others: the next record opens a new generation of the board."""
        self._stale = True

    def open(self) -> None:
        """Write the schema. Raises a ``BoardError`` if the board cannot be made."""
        schema, self._folds = fit(
            Schema(
                run=self._run,
                gauges=tuple(series for s in self._sources for series, _ in s.gauges()),
                counters=tuple(series for s in self._sources for series, _ in s.counters()),
                infos=tuple(series for s in self._sources for series in s.infos()),
                histograms=tuple(
                    HistogramSeries(series.name, series.labels, histogram.bounds)
                    for s in self._sources
                    for series, histogram in s.histograms()
                ),
                tables=tuple(s.table for s in self._sources if s.table is not None),
            )
        )
        if self._writer is None:
            self._writer = BoardWriter.create(self._directory, schema)
        else:
            self._writer.restart(schema)
        self._stale = False

    def publish(self, step: int, rows: Mapping[int, Values]) -> None:
        """Append a record. ``rows`` maps the ``id`` of a source to the rows of its table."""
        with self._guard:
            self._newest = step, time.time()
            self._append(rows)

    def refresh(self) -> None:
        """Publish what has changed since the newest step, without making it look any newer."""
        with self._guard:
            if self._writer is not None:
                self._append({})

    def _append(self, rows: Mapping[int, Values]) -> None:
        if self._stale:
            self.open()
        assert self._writer is not None
        tables = [rows.get(id(s)) for s in self._sources if s.table is not None]
        self._writer.publish(
            *self._newest,
            np.array([value for s in self._sources for _, value in s.gauges()], np.float64),
            apply_folds(self._folds, tables),
            np.array([value for s in self._sources for _, value in s.counters()], np.float64),
            [(histogram.counts, histogram.sum) for s in self._sources for _, histogram in s.histograms()],
        )

    def close(self, state: str) -> None:
        """Leave the board to the agent, marked as ``finished`` or ``failed``."""
        if self._writer is not None:
            self._writer.close(state)


@functools.lru_cache(maxsize=4096)
def labelled(name: str, *labels: tuple[str, str]) -> Series:
    """The series of this name and these labels: the same object each time, so that a step makes none."""
    return Series(name, dict(labels))


def histogram(name: str) -> Histogram:
    """An empty histogram with the catalogue's buckets of metric ``name``."""
    return Histogram(CATALOGUE[name].buckets)
