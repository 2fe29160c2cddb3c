"""One generation of a board as its writer holds it: the file, and in memory the bytes of the next write."""

from __future__ import annotations

import os
import secrets
import struct
import time
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from optwatch.board import locks
from optwatch.board.directory import is_shared
from optwatch.board.errors import BoardDirectoryError, BoardSpaceError
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
#: Counts per bucket (bounds + 1) since the start, and the sum of what was observed.
HistogramValues: TypeAlias = tuple[Sequence[float] | Values, float]

_CRC = struct.Struct("<I")


@dataclass
class Progress:
    """Where the run stands: what outlives a generation."""

    state: State = State.RUNNING
    update: int = 0
    step: int = -1
    time: float = field(default_factory=time.time)
    sample_time: float = 0.0
    write_failures: int = 0


class RecordBuffer:
    """A record's bytes in memory, with one array over each part of it."""

    def __init__(self, schema: Schema, size: int, full: bool) -> None:
        self.head = 0  # records written so far into this ring
        self.full = full
        self.buffer = bytearray(size)
        self._body = memoryview(self.buffer)[_CRC.size :]
        self._kinds = memoryview(self.buffer)[RECORD.size : RECORD.size + len(schema.tables)]
        self._padded = kinds_bytes(schema)
        values = np.frombuffer(self.buffer, dtype=np.float64, offset=values_offset(schema))
        start = len(schema.gauges)
        self._gauges = values[:start].data
        self._full_rows: list[Values] = []
        self._cheap_rows: list[Values] = []
        for table in schema.tables:
            rows = len(table.tensors)
            cells = rows * (table.width if full else CHEAP_WIDTH)
            place = values[start : start + cells]
            self._cheap_rows.append(place[: rows * CHEAP_WIDTH].reshape(rows, CHEAP_WIDTH))
            if full:
                self._full_rows.append(place.reshape(rows, table.width))
            start += cells

    def fill(self, gauges: Sequence[float] | Values, tables: Sequence[Values | None]) -> None:
        """Copy a step's values in. Raises ValueError if a shape is not the schema's."""
        if len(tables) != len(self._kinds):
            raise ValueError(f"{len(tables)} tables given, the schema has {len(self._kinds)}")
        if len(gauges) != len(self._gauges):
            raise ValueError(f"{len(gauges)} gauges given, the schema has {len(self._gauges)}")
        self._gauges[:] = array("d", gauges)
        for index, rows in enumerate(tables):
            if rows is None:
                self._kinds[index] = TableKind.ABSENT
                continue
            cheap = rows.shape[1] == CHEAP_WIDTH
            place = self._cheap_rows[index] if cheap else self._full_rows[index]
            if rows.shape != place.shape:
                raise ValueError(f"table {index} is {rows.shape}, the schema has {place.shape}")
            place[:] = rows
            self._kinds[index] = TableKind.CHEAP if cheap else TableKind.FULL

    def seal(self, sequence: int, step: int, time_s: float) -> None:
        """Number the record and sign it."""
        RECORD.pack_into(self.buffer, 0, 0, self._padded, self.head, sequence, step, time_s)
        _CRC.pack_into(self.buffer, 0, zlib.crc32(self._body))


class Generation:
    """A file under construction or in use. All memory that a step needs is allocated here.

    Raises BoardTooLargeError if the schema does not fit a board.
    """

    def __init__(self, schema: Schema, number: int) -> None:
        self.schema, self.number = schema, number
        self._json = schema.to_json()
        self._layout = Layout.fit(schema, len(self._json))
        self.cheap = RecordBuffer(schema, self._layout.cheap_bytes, full=False)
        self.full = RecordBuffer(schema, self._layout.full_bytes, full=True)
        self._fd = -1
        self._live = bytearray(self._layout.live_bytes)
        self._live_body = memoryview(self._live)[_CRC.size :]
        cells = np.frombuffer(self._live, dtype=np.float64, offset=LIVE.size, count=live_values(schema))
        self._counters = cells[: len(schema.counters)].data
        self._histograms: list[memoryview] = []
        start = len(schema.counters)
        for histogram in schema.histograms:
            self._histograms.append(cells[start : start + len(histogram.bounds) + 2].data)
            start += len(histogram.bounds) + 2

    @property
    def is_open(self) -> bool:
        """Whether there is a file to write to."""
        return self._fd >= 0

    @property
    def published(self) -> int:
        """Records so far in both rings."""
        return self.cheap.head + self.full.head

    def open(self, path: Path, progress: Progress) -> None:
        """Write a complete file beside the final name, locked, then rename it: no reader sees a part of it.

        Raises BoardDirectoryError if the file cannot be made, BoardSpaceError if its blocks cannot be had.
        """
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd = os.open(temporary, flags, 0o600)
        except OSError as error:
            raise BoardDirectoryError(f"{temporary}: cannot be made: {error.strerror}") from error
        try:
            if is_shared(path.parent):
                os.fchmod(self._fd, 0o640)
            locks.try_lock(self._fd)
            _reserve(self._fd, self._layout.total_bytes)
            os.pwrite(self._fd, self._header() + self._json, 0)
            self.write_live(progress)
            temporary.rename(path)
        except OSError as error:
            self.release()
            temporary.unlink()
            raise BoardSpaceError(
                f"{path}: {self._layout.total_bytes} bytes could not be reserved: {error.strerror}"
            ) from error

    def accumulate(self, counters: Sequence[float] | Values, histograms: Sequence[HistogramValues]) -> None:
        """Take the cumulative values. Raises ValueError if a shape is not the schema's."""
        if len(counters) != len(self._counters) or len(histograms) != len(self._histograms):
            raise ValueError(
                f"{len(counters)} counters and {len(histograms)} histograms given, "
                f"the schema has {len(self._counters)} and {len(self._histograms)}"
            )
        self._counters[:] = array("d", counters)
        for place, (counts, total) in zip(self._histograms, histograms, strict=True):
            place[:] = array("d", [*counts, total])

    def inherit(self, old: Generation) -> None:
        """Take over the cumulative values of the series that both generations have."""
        totals = map(float, old._counters)
        counters = dict(zip((s.key for s in old.schema.counters), totals, strict=True))
        self._counters[:] = array("d", [counters.get(series.key, 0.0) for series in self.schema.counters])
        kept = dict(zip(((h.key, h.bounds) for h in old.schema.histograms), old._histograms, strict=True))
        for histogram, place in zip(self.schema.histograms, self._histograms, strict=True):
            if (known := kept.get((histogram.key, histogram.bounds))) is not None:
                place[:] = known

    def append(self, record: RecordBuffer) -> bool:
        """Write the sealed record to its ring; False if that failed."""
        if not self._write(record.buffer, self._layout.place(record.head, record.full)):
            return False
        record.head += 1
        return True

    def write_live(self, progress: Progress) -> bool:
        """Write the live header to the slot of the last but one; False if that failed."""
        progress.update += 1
        LIVE.pack_into(
            self._live, 0, 0, progress.state, progress.update, self.published, self.cheap.head, self.full.head,
            progress.step, progress.time, progress.sample_time, progress.write_failures,
        )  # fmt: skip
        _CRC.pack_into(self._live, 0, zlib.crc32(self._live_body))
        return self._write(
            self._live, self._layout.live_offset + progress.update % 2 * self._layout.live_bytes
        )

    def release(self) -> None:
        """Let go of the file and with it of the lock."""
        locks.release(self._fd)
        self._fd = -1

    def _write(self, buffer: bytearray, offset: int) -> bool:
        try:
            return os.pwrite(self._fd, buffer, offset) == len(buffer)
        except OSError:
            return False

    def _header(self) -> bytes:
        layout = self._layout
        header = HEADER.pack(
            MAGIC, VERSION, layout.schema_bytes, self.number, zlib.crc32(self._json), layout.live_bytes,
            layout.cheap_depth, layout.cheap_bytes, layout.full_depth, layout.full_bytes, 0,
        )  # fmt: skip
        return header[: -_CRC.size] + _CRC.pack(zlib.crc32(header[: -_CRC.size]))


def _reserve(fd: int, size: int) -> None:
    """Allocate the blocks now: a sparse file fails later, in the middle of training."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
        return
    zeros, done = bytes(1 << 16), 0  # macOS has no posix_fallocate
    while done < size:
        done += os.pwrite(fd, zeros[: size - done], done)
