"""One board, fed by several probes: it turns their series into a schema and their values into records."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

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


class _Snapshot:
    """All that the sources have at one moment. Another thread may change a source at any other."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self.gauges: list[float] = []
        self.counters: list[float] = []
        self.histograms: list[tuple[Series, Histogram]] = []
        self.tables: list[int] = []  # the ``id`` of the source of each
        self.shape: list[Any] = []  # what the values belong to, source after source: compared by identity
        for source in sources:
            gauges, counters, histograms, table = (
                source.gauges(),
                source.counters(),
                source.histograms(),
                source.table,
            )
            self.shape += (gauges.series, counters.series, histograms, table)
            self.gauges += gauges.values
            self.counters += counters.values
            self.histograms += histograms
            if table is not None:
                self.tables.append(id(source))


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
        self._shape: list[Any] = []  # of the schema
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
            self._describe(_Snapshot(self._sources))

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
        now = _Snapshot(self._sources)
        # Another thread may be about to tell that its series are others.
        if stale or not same(self._shape, now.shape):
            self._describe(now)
        assert self._writer is not None
        self._writer.publish(
            *self._newest,
            now.gauges,
            apply_folds(self._folds, list(map(rows.get, now.tables))),
            now.counters,
            [(histogram.counts, histogram.sum) for _, histogram in now.histograms],
        )

    def _describe(self, now: _Snapshot) -> None:
        """Open a board, or a new generation of it, whose schema is that of ``now``."""
        self._shape = now.shape
        gauges, counters = (itertools.chain(*now.shape[i::4]) for i in range(2))
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
                tables=tuple(table for table in now.shape[3::4] if table is not None),
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
