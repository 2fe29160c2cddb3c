"""One board, fed by several probes: it turns their series into a schema and their values into records."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

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
from optwatch.hooks.figures import Figures, same


class Source(Protocol):
    """Something with values to publish: the probe of an optimizer, or the training loop itself.

    Its series may change, or its table; the source then calls :meth:`Publisher.changed`. What it returns holds other
    objects from then on.
    """

    @property
    def table(self) -> Table | None:
        """What its rows describe; None if it has none."""

    def gauges(self) -> Figures:
        """Each gauge with its value of now; NaN where there is none."""

    def counters(self) -> Figures:
        """Each counter with its total so far."""

    def histograms(self) -> Sequence[tuple[Series, Histogram]]:
        """Each histogram; the same list for as long as it has the same in it."""

    def infos(self) -> Sequence[Series]:
        """Facts, as labels."""


class _Snapshot(NamedTuple):
    """All that the sources have at one moment. Another thread may change a source at any other."""

    gauges: list[Figures]
    counters: list[Figures]
    histograms: list[Sequence[tuple[Series, Histogram]]]
    tables: list[tuple[int, Table]]  # with the ``id`` of the source

    def shape(self) -> list[object]:
        """What the values belong to: compared by identity."""
        figures = itertools.chain(self.gauges, self.counters)
        return [*(one.series for one in figures), *self.histograms, *(table for _, table in self.tables)]


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
        self._shape: list[object] = []  # of the schema
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
        if stale or not same(self._shape, now.shape()):
            self._describe(now)
        assert self._writer is not None
        self._writer.publish(
            *self._newest,
            [value for figures in now.gauges for value in figures.values],
            apply_folds(self._folds, [rows.get(source) for source, _ in now.tables]),
            [value for figures in now.counters for value in figures.values],
            [(histogram.counts, histogram.sum) for pairs in now.histograms for _, histogram in pairs],
        )

    def _collect(self) -> _Snapshot:
        sources = self._sources
        return _Snapshot(
            [source.gauges() for source in sources],
            [source.counters() for source in sources],
            [source.histograms() for source in sources],
            [(id(source), table) for source in sources if (table := source.table) is not None],
        )

    def _describe(self, now: _Snapshot) -> None:
        """Open a board, or a new generation of it, whose schema is that of ``now``."""
        self._shape = now.shape()
        schema, self._folds = fit(
            Schema(
                run=self._run,
                gauges=tuple(series for figures in now.gauges for series in figures.series),
                counters=tuple(series for figures in now.counters for series in figures.series),
                infos=tuple(series for source in self._sources for series in source.infos()),
                histograms=tuple(
                    HistogramSeries(series.name, series.labels, histogram.bounds)
                    for pairs in now.histograms
                    for series, histogram in pairs
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
