"""`LocalStore`: the exporter that keeps each run's history in a file of its own."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from optwatch import __version__
from optwatch.exporters.base import HistogramValue, Point, Snapshot
from optwatch.exporters.store.runfile import Key, RunFile, StoreError
from optwatch.exporters.store.runs import SUFFIX, stored_runs

log = logging.getLogger("optwatch.agent")

FLUSH_SECONDS = 5.0  # what a kill of the agent may lose
RETRY_SECONDS = 30.0  # after the file system refused
MEMORY_LIMIT = 4 << 20  # bytes of a run that is kept in memory only

_FACTS = ("run_id", "world_size", "host", "job_id")


class LocalStore:
    """Keeps the history of runs, a file each, or in memory only.

    A rank's values are kept while it lives, and once more after its end: the last values that the agent goes on
    serving are no history. What a file system refuses is counted in `failures` and left out.

    Args:
        directory: of the files, made if it is not there; None keeps them in memory while the run is served.
        run_limit: bytes of one run's file, kept by halving its resolution.
        total_limit: bytes of all files together, kept by removing the oldest runs.
        clock: gives the Unix time.
    """

    name = "store"

    def __init__(
        self,
        directory: Path | None,
        *,
        run_limit: int = 36 << 20,
        total_limit: int = 1 << 30,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory, self._run_limit, self._total_limit = directory, run_limit, total_limit
        self._clock = clock
        self._runs: dict[str, RunFile] = {}
        self._ended: set[tuple[str, str]] = set()  # run and rank of which the last values are kept already
        self._refused: set[str] = set()  # runs whose file is another's, or damaged: the others are kept
        self._flushed = self._silent_until = 0.0
        self._problem = ""  # the newest one, said once
        self.failures = 0

    @property
    def runs(self) -> dict[str, RunFile]:
        """The runs that are being served now, by id."""
        return dict(self._runs)

    def accept(self, snapshot: Snapshot) -> None:
        """Take a snapshot in. Never raises for what the disk does."""
        now = self._clock()
        if now < self._silent_until <= now + RETRY_SECONDS:  # beyond that the clock was set back
            return
        try:
            self._take(snapshot, now)
            if abs(now - self._flushed) >= FLUSH_SECONDS:
                self._flushed = now
                for run in self._runs.values():
                    run.flush()
        except (sqlite3.Error, OSError) as error:
            self._give_up(now, error)

    def points(self) -> Iterator[tuple[str, Point]]:
        """What the store tells of itself."""
        yield "optwatch.store_failures", Point({}, float(self.failures))

    def close(self) -> None:
        """Write what is left."""
        for run in self._runs.values():
            try:
                run.close()
            except sqlite3.Error as error:
                log.warning("%s: %s", run.path, error)
        self._runs.clear()

    def _take(self, snapshot: Snapshot, now: float) -> None:
        living = self._living(snapshot)
        served = {point.labels["run_id"] for point in snapshot.get("optwatch.run", ())}
        for run_id in self._runs.keys() - served:
            self._runs.pop(run_id).close()
        self._refused &= served
        for run_id in {run for run, _ in living} - self._runs.keys() - self._refused:
            self._start(run_id, snapshot)
        values: dict[str, list[tuple[Key, float]]] = {
            run_id: [] for run_id, _ in living if run_id in self._runs
        }
        for labels, key, value in _values(snapshot):
            run = labels.get("run_id")
            if run is None:  # of the node: part of every run's history
                for history in values.values():
                    history.append((key, value))
            elif run in values and (run, labels.get("rank", "")) in living:
                values[run].append((key, value))
        for run_id, history in values.items():
            self._runs[run_id].add(now, history)

    def _living(self, snapshot: Snapshot) -> set[tuple[str, str]]:
        """Run and rank of those to be kept: that live, or whose end is not yet kept."""
        ups = {
            (point.labels["run_id"], point.labels["rank"]): point.value
            for point in snapshot.get("optwatch.rank_up", ())
        }
        living = {key for key, up in ups.items() if up or key not in self._ended}
        self._ended = {key for key, up in ups.items() if not up}
        return living

    def _start(self, run_id: str, snapshot: Snapshot) -> None:
        try:
            self._runs[run_id] = run = self._file(run_id)
        except StoreError as error:
            self._refused.add(run_id)
            self.failures += 1
            log.warning("run %s is not stored: %s", run_id, error)
            return
        for point in snapshot["optwatch.run"]:
            if point.labels["run_id"] == run_id:
                run.describe({name: point.labels.get(name, "") for name in _FACTS} | {"version": __version__})
                break

    def _file(self, run_id: str) -> RunFile:
        if self._directory is None:
            return RunFile(None, MEMORY_LIMIT)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._make_room()
        return RunFile(self._directory / f"{run_id}{SUFFIX}", self._run_limit)

    def _make_room(self) -> None:
        """Remove the oldest runs until one more fits."""
        assert self._directory is not None
        open_files = {run.path for run in self._runs.values()}
        room = self._total_limit - self._run_limit * (1 + len(open_files))
        for path in stored_runs(self._directory):
            if path in open_files:
                continue
            room -= path.stat().st_size
            if room < 0:
                log.info("%s: removed, the store is full", path)
                for part in (path, *path.parent.glob(f"{path.name}-*")):
                    part.unlink(missing_ok=True)

    def _give_up(self, now: float, error: Exception) -> None:
        """Leave the files alone for a while; their runs go on when the disk does."""
        self.failures += 1
        self._silent_until = now + RETRY_SECONDS
        if str(error) != self._problem:
            self._problem = str(error)
            log.warning(
                "nothing is stored in %s, tried again every %g s: %s", self._directory, RETRY_SECONDS, error
            )
        for run in self._runs.values():
            run.abandon()
        self._runs.clear()


def _values(snapshot: Snapshot) -> Iterator[tuple[dict[str, str], Key, float]]:
    """Labels, key and value of every number of a snapshot; a histogram has two."""
    for name, points in snapshot.items():
        for point in points:
            labels = dict(point.labels)
            pairs = _pairs(point)
            if isinstance(point.value, HistogramValue):
                yield labels, (f"{name}#sum", pairs), point.value.sum
                yield labels, (f"{name}#count", pairs), sum(point.value.counts)
            else:
                yield labels, (name, pairs), point.value


def _pairs(point: Point) -> tuple[tuple[str, str], ...]:
    """Labels but for the run, which the file is of."""
    return tuple((name, value) for name, value in point.labels.items() if name != "run_id")
