"""Writing a board: a few microseconds a step, and never a reason for training to stop."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from optwatch.board import locks
from optwatch.board.directory import board_directory, board_name, secure_directory
from optwatch.board.errors import BoardBusyError
from optwatch.board.generation import Generation, HistogramValues, Progress, Values
from optwatch.board.layout import State
from optwatch.board.schema import CHEAP_WIDTH, Schema

__all__ = ["BoardWriter", "HistogramValues", "Values"]

_STATES = {"finished": State.FINISHED, "failed": State.FAILED}


class BoardWriter:
    """The only writer of one rank's board. Make it with `create`.

    After that nothing here raises for what the operating system does: a write that fails is counted in
    ``write_failures`` and the step goes on. In a forked child every method does nothing. Methods may be called from
    several threads.
    """

    def __init__(self, path: Path, schema: Schema) -> None:
        self._path = path
        self._pid = os.getpid()
        self._guard = threading.Lock()
        self._progress = Progress()
        self._generation = Generation(schema, time.time_ns())
        self._generation.open(path, self._progress)

    @classmethod
    def create(cls, directory: str | os.PathLike[str] | None, schema: Schema) -> BoardWriter:
        """Make the file of ``schema.run``'s rank in ``directory`` (None: `board_directory`) and lock it.

        Raises:
            BoardSchemaError: run_id is not a plain name, or the schema is too large (BoardTooLargeError).
            BoardDirectoryError: the directory is not private, or not writable.
            BoardSpaceError: the file system is full. The file's blocks are reserved here, once.
            BoardBusyError: a living process writes the board of the same run and rank.
        """
        root = board_directory() if directory is None else secure_directory(directory)
        path = root / board_name(schema.run["run_id"], schema.run["rank"])
        _refuse_living(path)
        return cls(path, schema)

    @property
    def path(self) -> Path:
        """The board's file."""
        return self._path

    @property
    def schema(self) -> Schema:
        """The schema of the current generation."""
        return self._generation.schema

    @property
    def write_failures(self) -> int:
        """Writes that the operating system refused so far."""
        return self._progress.write_failures

    def publish(
        self,
        step: int,
        time_s: float,
        gauges: Sequence[float] | Values,
        tables: Sequence[Values | None],
        counters: Sequence[float] | Values,
        histograms: Sequence[HistogramValues] = (),
    ) -> bool:
        """Append one record and renew the live header; returns False if it could not be written.

        Args:
            step: number of the step.
            time_s: Unix time at which it ended.
            gauges: numbers ``[len(schema.gauges)]``, NaN = absent.
            tables: per table None, float64 ``[tensors, 3]`` (the cheap fields) or float64 ``[tensors, width]``.
            counters: numbers ``[len(schema.counters)]``, cumulative.
            histograms: per histogram its counts ``[bounds + 1]`` since the start (buckets not including each
                other, see `Histogram`) and the sum of the observed values.

        Raises:
            ValueError: an array does not have the schema's shape.
        """
        if self._pid != os.getpid():
            return False
        with self._guard:
            generation, progress = self._generation, self._progress
            if not generation.is_open:
                return False
            full = False
            for rows in tables:
                full |= rows is not None and rows.shape[1] != CHEAP_WIDTH
            record = generation.full if full else generation.cheap
            record.fill(gauges, tables)
            generation.accumulate(counters, histograms)
            record.seal(generation.published, step, time_s)
            written = generation.append(record)
            if written and full:
                progress.sample_time = time_s
            progress.step, progress.time = step, time_s
            progress.write_failures += not written
            return self._write_live() and written

    def restart(self, schema: Schema) -> None:
        """Open a new generation under the same name: tensors were added, or formats changed.

        Counters and histograms that both schemas have carry on; readers of the old file see that it was
        superseded. Run id and rank must stay (ValueError). Raises like `create`; the old generation then goes on.
        """
        if self._pid != os.getpid():
            return
        if board_name(schema.run["run_id"], schema.run["rank"]) != self._path.name:
            raise ValueError(f"a new generation keeps the run and rank of {self._path.name}")
        with self._guard:
            old = self._generation
            if not old.is_open:
                return
            new = Generation(schema, old.number + 1)
            new.inherit(old)
            new.open(self._path, self._progress)
            self._generation = new
            self._progress.state = State.SUPERSEDED
            old.write_live(self._progress)
            old.release()
            self._progress.state = State.RUNNING

    def close(self, state: str = "finished") -> None:
        """Say how the run ended ("finished" or "failed") and let go of the file, which stays for the agent."""
        if state not in _STATES:
            raise ValueError(f"state {state!r}: expected one of {sorted(_STATES)}")
        if self._pid != os.getpid():
            return
        with self._guard:
            if self._generation.is_open:
                self._progress.state = _STATES[state]
                self._write_live()
                self._generation.release()

    def _write_live(self) -> bool:
        written = self._generation.write_live(self._progress)
        self._progress.write_failures += not written
        return written


def _refuse_living(path: Path) -> None:
    try:
        living = locks.held_here(path.lstat())
        if not living:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                living = locks.is_locked(fd)
            finally:
                os.close(fd)
    except OSError:  # no such file: the usual case; anything else is found out when ours is made
        return
    if living:
        raise BoardBusyError(f"{path}: a living process already writes this run and rank; use another run_id")
