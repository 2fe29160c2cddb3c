"""One rank as the agent sees it: its board, its newest values, whether it lives."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from optwatch.agent.host import resident_bytes
from optwatch.agent.rows import TableView
from optwatch.board import BoardError, BoardReader, Live, Record, Series, State, TensorInfo
from optwatch.exporters.base import HistogramValue, Point
from optwatch.metrics.catalogue import CATALOGUE
from optwatch.metrics.spec import MetricSpec

log = logging.getLogger("optwatch.agent")

_LATEST = 1 << 33  # Unix time that no clock shows for two centuries; beyond 2**64 ns nothing can be pushed
_STATES = ("running", "finished", "failed", "lost")
_RUN_FACTS = CATALOGUE["optwatch.run"].labels


class Rank:
    """Follows one board through its generations.

    Raises BoardError from the constructor if the board cannot be read; later problems are kept in ``problem``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: BoardError | None = None
        self.dropped = 0
        self.ended: float | None = None  # time.monotonic() at which the writer was gone
        self._first_poll = True
        self._seen_alive = False
        self._live: Live | None = None
        self._record: Record | None = None
        self._bind(BoardReader(path))

    @property
    def key(self) -> str:
        """The name that identifies the rank among all ranks of all runs."""
        return self.path.name

    @property
    def alive(self) -> bool:
        """Whether the writer lived at the last poll."""
        return self.ended is None

    @property
    def pid(self) -> int | None:
        """The process id as this process sees it; None if it is dead, or in a namespace that cannot be seen."""
        return self._reader.holder() if self.alive else None

    def poll(self) -> None:
        """Take in what is new."""
        try:
            if self._reader.superseded():
                self._settle(self._reader.alive())  # what has taken its name may be no board, for ever
                self._reopen()
            # The lock first: what a writer wrote before it died is then never missed.
            self._settle(self._reader.alive())
            poll = self._reader.poll()
        except BoardError as error:
            self._forget()
            self.problem = error
            return
        self.problem = None
        self._live = poll.live
        if not self._first_poll:  # what came before this agent is not its loss
            self.dropped += poll.lost
        self._first_poll = False
        for record in poll.records:
            self._take(record)

    def points(self) -> Iterator[tuple[str, Point]]:
        """Metric name and point of every value, the most important ones first."""
        yield from self._state()
        if self._live is None:
            return
        live = self._live
        yield (
            "optwatch.samples_dropped",
            Point(self.labels, float(self.dropped + live.write_failures), self.since),
        )
        if live.step >= 0:
            yield "optwatch.step", self._point({}, live.step)
            yield "optwatch.last_step_timestamp", self._point({}, live.time)
        if live.sample_time > 0:
            yield "optwatch.last_sample_timestamp", self._point({}, live.sample_time)
        pid = self.pid
        rss = resident_bytes(pid) if pid is not None else None
        if rss is not None:
            yield "optwatch.host_memory.rss", self._point({}, rss)
        yield from self._published(live)
        for view in self._views:
            yield from view.points()

    def worst(
        self, spec: MetricSpec, count: int
    ) -> Iterator[tuple[str, list[tuple[TensorInfo, str, float]]]]:
        """For each optimizer the tensors with the largest values of a metric; see `TableView.worst`."""
        if self._live is not None:
            for table, view in zip(self.schema.tables, self._views, strict=True):
                yield table.optimizer, view.worst(spec, count)

    def remove(self) -> None:
        """Delete the board, unless another one has taken its name meanwhile."""
        if not self._reader.superseded():
            self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let go of the board."""
        self._reader.close()

    def _bind(self, reader: BoardReader) -> None:
        self._reader, self.schema = reader, reader.schema
        run = self.schema.run
        self.labels = {"run_id": run["run_id"], "rank": str(run["rank"])}
        started = run.get("start_time")
        self.since = 0.0
        if isinstance(started, (int, float)) and 0 < started < _LATEST:
            self.since = float(started)
        self._series = {
            kind: list(self._known(kind, getattr(self.schema, kind)))
            for kind in ("gauges", "counters", "infos", "histograms")
        }
        self._forget()

    def _forget(self) -> None:
        """Stale is not fresh: what cannot be read again is not shown again."""
        self._live = None
        self._record = None
        self._views = [TableView(table, self.labels) for table in self.schema.tables]

    def _reopen(self) -> None:
        """Follow the path to its new file; without one the old file stays open, for its last values."""
        try:
            reader = BoardReader(self.path)
        except BoardError:
            if self.path.exists():
                raise
            return
        self._reader.close()
        self._bind(reader)
        self.ended = None

    def _known(self, kind: str, series: Iterable[Series]) -> Iterator[tuple[int, str, dict[str, str]]]:
        """Index, name and full labels of the series that the catalogue has."""
        for index, one in enumerate(series):
            labels = {**self.labels, **one.labels}
            try:
                CATALOGUE[one.name].check_labels(labels)
            except (KeyError, ValueError) as error:
                log.warning("%s: %s left out: %s", self.key, kind, error)
                continue
            yield index, one.name, labels

    def _take(self, record: Record) -> None:
        self._record = record
        for view, rows in zip(self._views, record.tables, strict=True):
            if rows is not None:
                view.take(rows)

    def _settle(self, living: bool) -> None:
        if living:
            self.ended, self._seen_alive = None, True
        elif self.ended is None:
            # A board found dead died when it was last written, not when this agent looked. One that was seen alive
            # has died just now: its last step may be long ago, and the clock may have been set since.
            age = 0.0 if self._seen_alive else max(0.0, time.time() - self._reader.modified())
            self.ended = time.monotonic() - age

    def _state(self) -> Iterator[tuple[str, Point]]:
        yield "optwatch.rank_up", self._point({}, float(self.alive))
        said = self._live.state if self._live is not None else State.RUNNING
        state = {State.FINISHED: "finished", State.FAILED: "failed"}.get(said, "running")
        if state == "running" and not self.alive:
            state = "lost"
        for name in _STATES:
            yield "optwatch.run_state", self._point({"state": name}, float(name == state))
        facts = {name: str(self.schema.run.get(name, "")) for name in _RUN_FACTS}
        yield "optwatch.run", Point(facts, 1.0)

    def _published(self, live: Live) -> Iterator[tuple[str, Point]]:
        for index, name, labels in self._series["counters"]:
            yield name, Point(labels, float(live.counters[index]), self.since)
        for _, name, labels in self._series["infos"]:
            if name != "optwatch.run":
                yield name, Point(labels, 1.0)
        if self._record is not None:
            for index, name, labels in self._series["gauges"]:
                value = float(self._record.gauges[index])
                if not math.isnan(value):
                    yield name, Point(labels, value)
        for index, name, labels in self._series["histograms"]:
            counts, total = live.histograms[index]
            if not (counts >= 0).all():
                continue  # NaN, or what no count can be
            bounds = self.schema.histograms[index].bounds
            yield name, Point(labels, HistogramValue(bounds, tuple(counts.tolist()), total), self.since)

    def _point(self, labels: dict[str, str], value: float) -> Point:
        return Point({**self.labels, **labels}, value)
