"""The board's file, byte by byte. Little endian; all offsets from the start of the file; all parts 64-byte aligned.

====================  ==================================================================================
offset                content
====================  ==================================================================================
0                     header, 64 bytes, written once (below)
64                    schema, JSON, ``schema_bytes`` long
``live_offset``       two live slots of ``live_bytes`` each; update n goes to slot n % 2, so that a writer
                      killed half-way leaves the older one whole
``cheap_offset``      ring of ``cheap_depth`` records of ``cheap_bytes`` each: steps without full statistics
``full_offset``       ring of ``full_depth`` records of ``full_bytes`` each: steps with them; a ring of their
                      own, so that the many cheap records between two full ones never push one out
``total_bytes``       end of the file, at most 4 MiB
====================  ==================================================================================

Header: ``magic`` 8 bytes "OPTWATCH", ``version`` u32, ``schema_bytes`` u32, ``generation`` u64, ``schema_crc``
u32, ``live_bytes`` u32, ``cheap_depth`` u32, ``cheap_bytes`` u32, ``full_depth`` u32, ``full_bytes`` u32,
12 bytes zero, ``crc`` u32 of the 60 bytes before it. Offsets follow from the schema and the two depths; a reader
recomputes them and refuses a file that disagrees.

Live slot: ``crc`` u32 of the rest, ``state`` u32 (`State`), ``update`` u64, ``published`` u64 (records so far),
``cheap_head`` u64 and ``full_head`` u64 (records so far in each ring), ``step`` i64, ``time`` f64 (Unix seconds),
``sample_time`` f64 (of the newest full record, 0 = none), ``write_failures`` u64; then f64: the counters; then per
histogram its bucket counts (bounds + 1) and its sum. All cumulative since the start of the run.

Record: ``crc`` u32 of the rest, ``kinds_bytes`` u32, ``index`` u64 (in its ring; slot = index % depth), ``sequence``
u64 (over both rings), ``step`` i64, ``time`` f64; then one byte per table (`TableKind`), padded to 8; then f64: the
gauges (NaN = absent); then the tables in order, rows of CHEAP_FIELDS in the cheap ring and rows of full width in
the full ring. A table marked absent or cheap in a full record uses none or the first part of its place.

crc is CRC-32 as in zlib. Nothing is mapped: a file truncated by somebody else must not kill the training process.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from optwatch.board.errors import BoardTooLargeError
from optwatch.board.schema import CHEAP_WIDTH, Schema

MAGIC = b"OPTWATCH"
VERSION = 1
MAXIMUM_BYTES = 4 << 20
ALIGNMENT = 64

HEADER = struct.Struct("<8sIIQIIIIII12xI")
LIVE = struct.Struct("<IIQQQQqddQ")
RECORD = struct.Struct("<IIQQqd")

# A reader that polls twice a second keeps up with 100 steps and 8 samples a second; memory is the price.
_CHEAP_DEPTH, _FULL_DEPTH = 64, 8
_LEAST_CHEAP_DEPTH, _LEAST_FULL_DEPTH = 4, 2


class State(IntEnum):
    """What the writer said last about its run."""

    RUNNING = 1
    FINISHED = 2
    FAILED = 3
    SUPERSEDED = 4  # a new generation has taken the file's name


class TableKind(IntEnum):
    """What a record holds of a table."""

    ABSENT = 0
    CHEAP = 1
    FULL = 2


def align(size: int, to: int = ALIGNMENT) -> int:
    """Round up to a multiple of ``to``."""
    return -(-size // to) * to


@dataclass(frozen=True)
class Layout:
    """Offsets and sizes of one generation, in bytes."""

    schema_bytes: int
    live_bytes: int
    cheap_depth: int
    cheap_bytes: int
    full_depth: int
    full_bytes: int

    @classmethod
    def of(cls, schema: Schema, schema_bytes: int, cheap_depth: int, full_depth: int) -> Layout:
        """The layout for given depths."""
        return cls(
            schema_bytes=schema_bytes,
            live_bytes=align(LIVE.size + 8 * live_values(schema)),
            cheap_depth=cheap_depth,
            cheap_bytes=align(values_offset(schema) + 8 * (len(schema.gauges) + _cells(schema, full=False))),
            full_depth=full_depth,
            full_bytes=align(values_offset(schema) + 8 * (len(schema.gauges) + _cells(schema, full=True))),
        )

    @classmethod
    def fit(cls, schema: Schema, schema_bytes: int, limit: int = MAXIMUM_BYTES) -> Layout:
        """The deepest rings that fit. Raises BoardTooLargeError if not even the shallowest do."""
        full = 0 if not schema.tables else _FULL_DEPTH
        cheap = _CHEAP_DEPTH
        while True:
            layout = cls.of(schema, schema_bytes, cheap, full)
            if layout.total_bytes <= limit:
                return layout
            if cheap > _LEAST_CHEAP_DEPTH:
                cheap //= 2
            elif full > _LEAST_FULL_DEPTH:
                full //= 2
            else:
                raise BoardTooLargeError(
                    f"the board would take {layout.total_bytes} bytes, at most {limit} are allowed; "
                    "fold its tables to groups with optwatch.board.fit"
                )

    @property
    def live_offset(self) -> int:
        """Offset of the first of the two live slots."""
        return align(HEADER.size + self.schema_bytes)

    @property
    def cheap_offset(self) -> int:
        """Offset of the ring of cheap records."""
        return self.live_offset + 2 * self.live_bytes

    @property
    def full_offset(self) -> int:
        """Offset of the ring of full records."""
        return self.cheap_offset + self.cheap_depth * self.cheap_bytes

    @property
    def total_bytes(self) -> int:
        """Size of the file."""
        return self.full_offset + self.full_depth * self.full_bytes

    def place(self, index: int, full: bool) -> int:
        """Offset of the record with this index in its ring."""
        if full:
            return self.full_offset + index % self.full_depth * self.full_bytes
        return self.cheap_offset + index % self.cheap_depth * self.cheap_bytes


def live_values(schema: Schema) -> int:
    """Number of float64 in a live slot."""
    return len(schema.counters) + sum(len(h.bounds) + 2 for h in schema.histograms)


def kinds_bytes(schema: Schema) -> int:
    """Bytes of the table kinds in a record, padded."""
    return align(len(schema.tables), 8)


def values_offset(schema: Schema) -> int:
    """Offset of the gauges in a record."""
    return RECORD.size + kinds_bytes(schema)


def _cells(schema: Schema, full: bool) -> int:
    return sum(len(t.tensors) * (t.width if full else CHEAP_WIDTH) for t in schema.tables)
