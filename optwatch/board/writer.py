"""Writing a board: a few microseconds a step, and never a reason for training to stop."""

from __future__ import annotations

import os
import secrets
import struct
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from optwatch.board import locks
from optwatch.board.directory import board_directory, board_name, secure_directory
from optwatch.board.errors import BoardBusyError, BoardDirectoryError, BoardSpaceError
from optwatch.board.layout import (
    HEADER,
    LIVE,
    MAGIC,
    RECORD,
    VERSION,
    Layout,
    State,
    TableKind,
    kinds_bytes,
    live_values,
    values_offset,
)
from optwatch.board.schema import CHEAP_WIDTH, Schema

Values: TypeAlias = NDArray[np.float64]
HistogramValues: TypeAlias = tuple[Values, float]  # counts per bucket (bounds + 1) since the start, their sum

_CRC = struct.Struct("<I")
_STATES = {"finished": State.FINISHED, "failed": State.FAILED}


class _Record:
    """A record's bytes in memory, with one array over each part of it."""

    def __init__(self, schema: Schema, size: int, full: bool) -> None:
        self.buffer = bytearray(size)
        self.body = memoryview(self.buffer)[_CRC.size :]
        self.kinds = memoryview(self.buffer)[RECORD.size : RECORD.size + len(schema.tables)]
        offset = values_offset(schema)
        values = np.frombuffer(self.buffer, dtype=np.float64, offset=offset)
        self.gauges = values[: len(schema.gauges)]
        start = len(schema.gauges)
        self.full: list[Values] = []
        self.cheap: list[Values] = []
        for table in schema.tables:
            rows = len(table.tensors)
            cells = rows * (table.width if full else CHEAP_WIDTH)
            place = values[start : start + cells]
            self.cheap.append(place[: rows * CHEAP_WIDTH].reshape(rows, CHEAP_WIDTH))
            if full:
                self.full.append(place.reshape(rows, table.width))
            start += cells


class BoardWriter:
    """The only writer of one rank's board. Make it with `create`.

    After that nothing here raises for what the operating system does: a write that fails is counted in
    ``write_failures`` and the step goes on. In a forked child every method does nothing.
    """

    def __init__(self, path: Path, schema: Schema, generation: int) -> None:
        self._path = path
        self._pid = os.getpid()
        self._guard = threading.Lock()
        self._state = State.RUNNING
        self._published = self._update = self._cheap_head = self._full_head = self.write_failures = 0
        self._step, self._time, self._sample_time = -1, time.time(), 0.0
        self._bind(schema, generation)
        self._open()

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
        return cls(path, schema, generation=time.time_ns())

    @property
    def path(self) -> Path:
        """The board's file."""
        return self._path

    @property
    def schema(self) -> Schema:
        """The schema of the current generation."""
        return self._schema

    def publish(
        self,
        step: int,
        time_s: float,
        gauges: Values,
        tables: Sequence[Values | None],
        counters: Values,
        histograms: Sequence[HistogramValues] = (),
    ) -> bool:
        """Append one record and renew the live header; returns False if it could not be written.

        Args:
            step: number of the step.
            time_s: Unix time at which it ended.
            gauges: float64 ``[len(schema.gauges)]``, NaN = absent.
            tables: per table None, float64 ``[tensors, 3]`` (the cheap fields) or float64 ``[tensors, width]``.
            counters: float64 ``[len(schema.counters)]``, cumulative.
            histograms: per histogram its counts ``[bounds + 1]`` since the start (buckets not including each
                other, see `Histogram`) and the sum of the observed values.

        Raises:
            ValueError: an array does not have the schema's shape.
        """
        if self._pid != os.getpid():
            return False
        with self._guard:
            if self._fd < 0:
                return False
            full = any(rows is not None and rows.shape[1] != CHEAP_WIDTH for rows in tables)
            record, index = (self._full, self._full_head) if full else (self._cheap, self._cheap_head)
            self._fill(record, full, gauges, tables)
            self._accumulate(counters, histograms)
            RECORD.pack_into(record.buffer, 0, 0, self._kinds_bytes, index, self._published, step, time_s)
            _CRC.pack_into(record.buffer, 0, zlib.crc32(record.body))
            written = self._write(record.buffer, self._layout.place(index, full))
            if written:
                self._published += 1
                if full:
                    self._full_head += 1
                    self._sample_time = time_s
                else:
                    self._cheap_head += 1
            self._step, self._time = step, time_s
            return self._write_live() and written

    def restart(self, schema: Schema) -> None:
        """Open a new generation under the same name: tensors were added, or formats changed.

        Counters and histograms that both schemas have carry on; readers of the old file see that it was superseded.
        Run id and rank must stay. Raises like `create`; the old generation then goes on.
        """
        if self._pid != os.getpid():
            return
        if board_name(schema.run["run_id"], schema.run["rank"]) != self._path.name:
            raise ValueError(f"a new generation keeps the run and rank of {self._path.name}")
        with self._guard:
            if self._fd < 0:
                return
            successor = BoardWriter.__new__(BoardWriter)
            successor.__dict__.update(self.__dict__)
            successor._bind(schema, self._generation + 1)
            successor._carry(self)
            successor._published = successor._cheap_head = successor._full_head = 0
            successor._open()
            self._state = State.SUPERSEDED
            self._write_live()
            self._release()
            self.__dict__.update(successor.__dict__)

    def close(self, state: str = "finished") -> None:
        """Say how the run ended ("finished" or "failed") and let go of the file, which stays for the agent."""
        if state not in _STATES:
            raise ValueError(f"state {state!r}: expected one of {sorted(_STATES)}")
        if self._pid != os.getpid():
            return
        with self._guard:
            if self._fd >= 0:
                self._state = _STATES[state]
                self._write_live()
                self._release()

    def _bind(self, schema: Schema, generation: int) -> None:
        """Make the buffers of a generation; all memory a step needs is allocated here."""
        self._schema, self._generation = schema, generation
        self._json = schema.to_json()
        self._layout = Layout.fit(schema, len(self._json))
        self._kinds_bytes = kinds_bytes(schema)
        self._cheap = _Record(schema, self._layout.cheap_bytes, full=False)
        self._full = _Record(schema, self._layout.full_bytes, full=True)
        self._live = bytearray(self._layout.live_bytes)
        self._live_body = memoryview(self._live)[_CRC.size :]
        cells = np.frombuffer(self._live, dtype=np.float64, offset=LIVE.size, count=live_values(schema))
        self._counters = cells[: len(schema.counters)]
        self._histograms: list[Values] = []
        start = len(schema.counters)
        for histogram in schema.histograms:
            self._histograms.append(cells[start : start + len(histogram.bounds) + 2])
            start += len(histogram.bounds) + 2

    def _open(self) -> None:
        """Write a complete file beside the final name, locked, then rename it: no reader sees a part of it."""
        temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(6)}.tmp")
        try:
            self._fd = os.open(
                temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise BoardDirectoryError(f"{temporary}: cannot be made: {error.strerror}") from error
        try:
            locks.try_lock(self._fd)
            _reserve(self._fd, self._layout.total_bytes)
            os.pwrite(self._fd, self._header() + self._json, 0)
            self._write_live()
            os.rename(temporary, self._path)
        except OSError as error:
            self._release()
            os.unlink(temporary)
            raise BoardSpaceError(
                f"{self._path}: {self._layout.total_bytes} bytes could not be reserved: {error.strerror}"
            ) from error

    def _header(self) -> bytes:
        layout = self._layout
        header = HEADER.pack(
            MAGIC, VERSION, layout.schema_bytes, self._generation, zlib.crc32(self._json), layout.live_bytes,
            layout.cheap_depth, layout.cheap_bytes, layout.full_depth, layout.full_bytes, 0,
        )  # fmt: skip
        return header[: -_CRC.size] + _CRC.pack(zlib.crc32(header[: -_CRC.size]))

    def _fill(self, record: _Record, full: bool, gauges: Values, tables: Sequence[Values | None]) -> None:
        if len(tables) != len(record.kinds):
            raise ValueError(f"{len(tables)} tables given, the schema has {len(record.kinds)}")
        if gauges.shape != record.gauges.shape:
            raise ValueError(f"{gauges.shape} gauges given, the schema has {record.gauges.shape}")
        record.gauges[:] = gauges
        for index, rows in enumerate(tables):
            if rows is None:
                record.kinds[index] = TableKind.ABSENT
                continue
            cheap = rows.shape[1] == CHEAP_WIDTH
            place = record.cheap[index] if cheap else record.full[index]
            if rows.shape != place.shape:
                raise ValueError(f"table {index} is {rows.shape}, the schema has {place.shape}")
            place[:] = rows
            record.kinds[index] = TableKind.CHEAP if cheap else TableKind.FULL

    def _accumulate(self, counters: Values, histograms: Sequence[HistogramValues]) -> None:
        if counters.shape != self._counters.shape or len(histograms) != len(self._histograms):
            raise ValueError(
                f"{counters.shape} counters and {len(histograms)} histograms given, "
                f"the schema has {self._counters.shape} and {len(self._histograms)}"
            )
        self._counters[:] = counters
        for place, (counts, total) in zip(self._histograms, histograms, strict=True):
            place[:-1] = counts
            place[-1] = total

    def _carry(self, old: BoardWriter) -> None:
        """Take over the accumulated values of the series that both generations have."""
        counters = {s.key: v for s, v in zip(old._schema.counters, old._counters, strict=True)}
        for index, series in enumerate(self._schema.counters):
            self._counters[index] = counters.get(series.key, 0.0)
        kept = {(h.key, h.bounds): v for h, v in zip(old._schema.histograms, old._histograms, strict=True)}
        for histogram, place in zip(self._schema.histograms, self._histograms, strict=True):
            place[:] = kept.get((histogram.key, histogram.bounds), 0.0)

    def _write_live(self) -> bool:
        self._update += 1
        LIVE.pack_into(
            self._live, 0, 0, self._state, self._update, self._published, self._cheap_head, self._full_head,
            self._step, self._time, self._sample_time, self.write_failures,
        )  # fmt: skip
        _CRC.pack_into(self._live, 0, zlib.crc32(self._live_body))
        offset = self._layout.live_offset + self._update % 2 * self._layout.live_bytes
        return self._write(self._live, offset)

    def _write(self, buffer: bytearray, offset: int) -> bool:
        try:
            if os.pwrite(self._fd, buffer, offset) == len(buffer):
                return True
        except OSError:
            pass
        self.write_failures += 1
        return False

    def _release(self) -> None:
        locks.forget(self._fd)
        os.close(self._fd)
        self._fd = -1


def _reserve(fd: int, size: int) -> None:
    """Allocate the blocks now: a sparse file fails later, in the middle of training."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
        return
    zeros, done = bytes(1 << 16), 0  # macOS has no posix_fallocate
    while done < size:
        done += os.pwrite(fd, zeros[: size - done], done)


def _refuse_living(path: Path) -> None:
    try:
        if locks.held_descriptor(os.lstat(path)) is None:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                living = locks.is_locked(fd)
            finally:
                os.close(fd)
        else:
            living = True
    except OSError:
        return
    if living:
        raise BoardBusyError(f"{path}: a living process already writes this run and rank; use another run_id")
