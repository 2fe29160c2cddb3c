"""One board, fed by several probes: it turns their series into a schema and their values into records."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

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


class _Snapshot(NamedTuple):
    """All that the sources have at one moment. Another thread may change a source at any other."""

    gauges: list[tuple[Series, float]]
    counters: list[tuple[Series, float]]
    histograms: list[tuple[Series, Histogram]]
    tables: list[tuple[int, Table]]  # with the ``id`` of the source

    def shape(self) -> _Shape:
        """What the values belong to."""
        return (
            [series for series, _ in self.gauges],
            [series for series, _ in self.counters],
            [series for series, _ in self.histograms],
            [source for source, _ in self.tables],
        )


_Shape = tuple[list[Series], list[Series], list[Series], list[int]]


class Publisher:
    """Writes the values of its sources to the rank's board, one record a step.

    ``guard`` is held while it does; whoever changes what several threads read takes it, too. It is never held for
    longer than a record takes.
    """

    def __init__(self, directory: str | None, run: Mapping[str, Any]) -> None:
        self._run, self._directory = dict(run), directory
        self._sources: list[Source] = []
        self._writer: BoardWriter | None = None
        self._stale = True
        self._shape: _Shape | None = None  # of the schema
        self._newest = -1, time.time()  # step and its time
        self.guard = (
            threading.RLock()
        )  # optimizers may be stepped, and checkpoints written, by several threads

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
        with self.guard:
            self._stale = False
            self._describe(self._collect())

    def publish(self, step: int, rows: Mapping[int, Values]) -> None:
        """Append a record. ``rows`` maps the ``id`` of a source to the rows of its table."""
        with self.guard:
            self._newest = step, time.time()
            self._append(rows)

    def refresh(self) -> None:
        """Publish what has changed since the newest step, without making it look any newer."""
        with self.guard:
            if self._writer is not None:
                self._append({})

    def _append(self, rows: Mapping[int, Values]) -> None:
        stale, self._stale = self._stale, False
        now = self._collect()
        # Another thread may be about to tell that its series are others.
        if stale or self._shape != now.shape():
            self._describe(now)
        assert self._writer is not None
        self._writer.publish(
            *self._newest,
            np.array([value for _, value in now.gauges], np.float64),
            apply_folds(self._folds, [rows.get(source) for source, _ in now.tables]),
            np.array([value for _, value in now.counters], np.float64),
            [(histogram.counts, histogram.sum) for _, histogram in now.histograms],
        )

    def _collect(self) -> _Snapshot:
        now = _Snapshot([], [], [], [])
        for source in self._sources:
            now.gauges.extend(source.gauges())
            now.counters.extend(source.counters())
            now.histograms.extend(source.histograms())
            if (table := source.table) is not None:
                now.tables.append((id(source), table))
        return now

    def _describe(self, now: _Snapshot) -> None:
        """Open a board, or a new generation of it, whose schema is that of ``now``."""
        self._shape = now.shape()
        gauges, counters, _, _ = self._shape
        schema, self._folds = fit(
            Schema(
                run=self._run,
                gauges=tuple(gauges),
                counters=tuple(counters),
                infos=tuple(series for source in self._sources for series in source.infos()),
                histograms=tuple(
                    HistogramSeries(series.name, series.labels, histogram.bounds)
                    for series, histogram in now.histograms
                ),
                tables=tuple(table for _, table in now.tables),
            )
        )
        if self._writer is None:
            self._writer = BoardWriter.create(self._directory, schema)
        else:
            self._writer.restart(schema)

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
