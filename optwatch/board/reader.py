"""Reading a board: everything is checked before it is believed."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from optwatch.board import locks
from optwatch.board.directory import opted_in_group
from optwatch.board.errors import (
    BoardCorruptError,
    BoardMagicError,
    BoardMissingError,
    BoardReadError,
    BoardSchemaError,
    BoardTruncatedError,
    BoardVersionError,
)
from optwatch.board.layout import (
    HEADER,
    LIVE,
    MAGIC,
    MAXIMUM_BYTES,
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

_ATTEMPTS = 4  # a live slot can be rewritten while it is read; four times in a row is not by chance


@dataclass(frozen=True)
class Live:
    """The newest live header: cumulative values and where the run stands."""

    state: State
    update: int
    published: int
    cheap_head: int
    full_head: int
    step: int  # -1 before the first
    time: float  # Unix seconds of the newest step
    sample_time: float  # of the newest full record; 0 before the first
    write_failures: int
    counters: Values  # [len(schema.counters)]
    histograms: tuple[tuple[Values, float], ...]  # counts [bounds + 1], sum of the values


@dataclass(frozen=True)
class Record:
    """One published step."""

    sequence: int
    step: int
    time: float  # Unix seconds
    gauges: Values  # [len(schema.gauges)], NaN = absent
    tables: tuple[Values | None, ...]  # [tensors, 3] or [tensors, width]; None = not in this step


@dataclass(frozen=True)
class Poll:
    """What a poll found: records in the order of writing, and how many were overwritten before they were read."""

    live: Live
    records: tuple[Record, ...]
    lost: int


class BoardReader:
    """One generation of a board. Errors in opening or reading it are `BoardError`; nothing else is raised.

    A reader is bound to the file it opened. When `superseded` turns true, open the path again.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._fd = -1
        self._borrowed = False
        self._fd, self._borrowed = _open(self.path)
        try:
            self.generation, self._layout, self.schema = self._read_header()
        except BaseException:
            self.close()
            raise
        self._cheap_next = self._full_next = 0
        self._sequence_next = 0

    @property
    def layout(self) -> Layout:
        """Offsets and depths of this generation."""
        return self._layout

    def live(self) -> Live:
        """The newest valid live header. Raises BoardCorruptError, BoardReadError, BoardTruncatedError."""
        for _ in range(_ATTEMPTS):
            both = self._read(self._layout.live_offset, 2 * self._layout.live_bytes)
            size = self._layout.live_bytes
            found = [live for slot in (both[:size], both[size:]) if (live := self._parse_live(slot))]
            if found:
                return max(found, key=lambda live: live.update)
        raise BoardCorruptError(f"{self.path}: neither live header matches its checksum")

    def poll(self) -> Poll:
        """Read what was published since the last poll. Raises like `live`."""
        live = self.live()
        records = [
            *self._ring(self._cheap_next, live.cheap_head, full=False),
            *self._ring(self._full_next, live.full_head, full=True),
        ]
        records.sort(key=lambda record: record.sequence)
        lost = max(0, live.published - self._sequence_next - len(records))
        self._cheap_next, self._full_next = live.cheap_head, live.full_head
        self._sequence_next = live.published
        return Poll(live, tuple(records), lost)

    def alive(self) -> bool:
        """Whether the writer's process still holds its lock."""
        try:
            return locks.is_locked(self._fd)
        except OSError:
            return False

    def holder(self) -> int | None:
        """The writer's process id as this process sees it; None if it is in another PID namespace, or dead.

        The id in the schema is the one in the writer's own namespace and can mean another process here.
        """
        if self._borrowed:
            return os.getpid() if self.alive() else None
        if not sys.platform.startswith("linux"):
            return None
        query = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)  # struct flock
        try:
            kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(self._fd, fcntl.F_GETLK, query))
        except OSError:
            return None
        return pid if kind != fcntl.F_UNLCK and pid > 0 else None

    def modified(self) -> float:
        """Unix time of the last write to the file."""
        return os.fstat(self._fd).st_mtime

    def superseded(self) -> bool:
        """Whether the path now names another file, or none."""
        try:
            here, there = os.fstat(self._fd), os.lstat(self.path)
        except OSError:
            return True
        return (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino)

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            (locks.give_back if self._borrowed else os.close)(self._fd)
        self._fd = -1

    def _read(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._fd, size, offset)
        except OSError as error:
            raise BoardReadError(f"{self.path}: {error.strerror}") from error
        if len(data) != size:
            raise BoardTruncatedError(
                f"{self.path}: ends at {offset + len(data)}, at least {offset + size} expected"
            )
        return data

    def _read_header(self) -> tuple[int, Layout, Schema]:
        total = os.fstat(self._fd).st_size
        if total < HEADER.size or total > MAXIMUM_BYTES:
            raise BoardTruncatedError(
                f"{self.path}: {total} bytes, expected {HEADER.size} to {MAXIMUM_BYTES}"
            )
        data = self._read(0, HEADER.size)
        (magic, version, schema_bytes, generation, schema_crc, live_bytes, cheap_depth, cheap_bytes,
         full_depth, full_bytes, crc) = HEADER.unpack(data)  # fmt: skip
        if magic != MAGIC:
            raise BoardMagicError(f"{self.path}: not a board")
        if version != VERSION:
            raise BoardVersionError(f"{self.path}: layout version {version}, this reader knows {VERSION}")
        if zlib.crc32(data[:-4]) != crc:
            raise BoardCorruptError(f"{self.path}: the header does not match its checksum")
        said = Layout(schema_bytes, live_bytes, cheap_depth, cheap_bytes, full_depth, full_bytes)
        if total != said.total_bytes:
            raise BoardTruncatedError(f"{self.path}: {total} bytes, its header says {said.total_bytes}")
        json = self._read(HEADER.size, schema_bytes)
        if zlib.crc32(json) != schema_crc:
            raise BoardCorruptError(f"{self.path}: the schema does not match its checksum")
        schema = Schema.from_json(json)
        if Layout.of(schema, schema_bytes, cheap_depth, full_depth) != said:
            raise BoardSchemaError(f"{self.path}: the sizes in the header are not those of the schema")
        return generation, said, schema

    def _parse_live(self, slot: bytes) -> Live | None:
        head = LIVE.unpack_from(slot)
        if zlib.crc32(memoryview(slot)[4:]) != head[0]:
            return None
        try:
            state = State(head[1])
        except ValueError:
            return None
        cells = np.frombuffer(slot, dtype=np.float64, offset=LIVE.size, count=live_values(self.schema))
        start = len(self.schema.counters)
        histograms = []
        for histogram in self.schema.histograms:
            end = start + len(histogram.bounds) + 2
            histograms.append((cells[start : end - 1], float(cells[end - 1])))
            start = end
        counters = cells[: len(self.schema.counters)]
        _, _, update, published, cheap_head, full_head, step, time, sample_time, failures = head
        return Live(
            state, update, published, cheap_head, full_head, step, time, sample_time, failures, counters,
            tuple(histograms),
        )  # fmt: skip

    def _ring(self, begin: int, head: int, full: bool) -> list[Record]:
        depth = self._layout.full_depth if full else self._layout.cheap_depth
        size = self._layout.full_bytes if full else self._layout.cheap_bytes
        records = []
        for index in range(max(begin, head - depth), head):
            data = self._read(self._layout.place(index, full), size)
            record = self._parse_record(data, index, full)
            if record is not None:
                records.append(record)
        return records

    def _parse_record(self, data: bytes, index: int, full: bool) -> Record | None:
        crc, padded, found, sequence, step, time = RECORD.unpack_from(data)
        if found != index or padded != kinds_bytes(self.schema) or zlib.crc32(memoryview(data)[4:]) != crc:
            return None
        kinds = data[RECORD.size : RECORD.size + len(self.schema.tables)]
        values = np.frombuffer(data, dtype=np.float64, offset=values_offset(self.schema))
        start = len(self.schema.gauges)
        tables: list[Values | None] = []
        for kind, table in zip(kinds, self.schema.tables, strict=True):
            if kind > (TableKind.FULL if full else TableKind.CHEAP):
                return None  # signed, but not by a writer of this version
            rows = len(table.tensors)
            width = table.width if kind == TableKind.FULL else CHEAP_WIDTH
            place = values[start : start + rows * width].reshape(rows, width)
            tables.append(None if kind == TableKind.ABSENT else place)
            start += rows * (table.width if full else CHEAP_WIDTH)
        return Record(sequence, step, time, values[: len(self.schema.gauges)], tuple(tables))


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor for reading, and whether it belongs to a writer in this process."""
    group = opted_in_group()
    try:
        status = os.lstat(path)
        own = locks.borrow(status)
        if own is not None:
            return own, True
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BoardMissingError(f"{path}: cannot be opened: {error.strerror}") from error
    status = os.fstat(fd)
    ours = status.st_uid == os.geteuid() or (status.st_gid == group and not status.st_mode & 0o022)
    if not stat.S_ISREG(status.st_mode) or not ours:
        os.close(fd)
        raise BoardMissingError(f"{path}: not a plain file of user {os.geteuid()}")
    return fd, False
