"""A board that is not what it should be is refused with a reason; nothing else is ever raised or believed."""

from __future__ import annotations

import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from board_samples import Feed, schema
from optwatch.board import (
    MAXIMUM_BYTES,
    BoardCorruptError,
    BoardError,
    BoardMagicError,
    BoardMissingError,
    BoardReader,
    BoardSchemaError,
    BoardTruncatedError,
    BoardVersionError,
    BoardWriter,
    Schema,
)
from optwatch.board.layout import HEADER, LIVE, MAGIC, RECORD, Layout, TableKind

STEPS = 30


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    """The bytes of a board after thirty steps, closed."""
    feed = Feed(BoardWriter.create(tmp_path_factory.mktemp("good"), schema()))
    feed.publish(STEPS)
    feed.writer.close()
    return feed.writer.path.read_bytes()


def read(path: Path, data: bytes) -> str:
    """Everything a reader can say about a file: the reason it was refused for, or ``ok`` after checking values."""
    path.write_bytes(data)
    try:
        reader = BoardReader(path)
        poll = reader.poll()
    except BoardError as error:
        return error.reason
    assert 0 <= poll.live.step <= STEPS
    assert poll.live.counters[0] == poll.live.step
    for record in poll.records:
        assert record.gauges[0] == 1000 + record.step
        np.testing.assert_array_equal(record.tables[0], record.step)
    reader.close()
    return "ok"


def test_the_good_board_is_good(tmp_path: Path, good: bytes) -> None:
    """What the others are changed from."""
    assert read(tmp_path / "a.board", good) == "ok"


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, 1 << 20))
def test_truncated_anywhere(tmp_path_factory, good: bytes, cut: int) -> None:
    """A file cut at any place is truncated, whatever is left of it."""
    data = good[: cut % len(good)]
    assert read(tmp_path_factory.getbasetemp() / "cut.board", data) == "truncated"


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 1 << 32), flips=st.integers(1, 50))
def test_flipped_bits_never_become_values(tmp_path_factory, good: bytes, seed: int, flips: int) -> None:
    """Any flipped bits: a typed refusal, or only records that are right."""
    pick = random.Random(seed)
    data = bytearray(good)
    for _ in range(flips):
        # Half of them into the first 4 KiB, which hold header, schema and live slots.
        place = pick.randrange(4096) if pick.random() < 0.5 else pick.randrange(len(data))
        data[place] ^= 1 << pick.randrange(8)
    assert read(tmp_path_factory.getbasetemp() / "flip.board", bytes(data)) in {
        "ok", "corrupt", "truncated", "not_a_board", "version", "schema",
    }  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1 << 32), size=st.integers(0, 3000), with_magic=st.booleans())
def test_noise(tmp_path_factory, seed: int, size: int, with_magic: bool) -> None:
    """Random bytes, with or without our magic, are refused."""
    data = random.Random(seed).randbytes(size)
    if with_magic:
        data = MAGIC + data
    assert read(tmp_path_factory.getbasetemp() / "noise.board", data) in {
        "not_a_board",
        "truncated",
        "version",
    }


@settings(max_examples=100, deadline=None)
@given(json=st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
def test_a_signed_schema_of_nonsense(tmp_path_factory, json: bytes) -> None:
    """Checksums that are right do not make a schema: its content is checked too."""
    layout = Layout(len(json), 64, 4, 64, 0, 64)
    head = HEADER.pack(MAGIC, 1, len(json), 1, zlib.crc32(json), 64, 4, 64, 0, 64, 0)[:-4]
    data = (head + struct.pack("<I", zlib.crc32(head)) + json).ljust(layout.total_bytes, b"\0")
    assert read(tmp_path_factory.getbasetemp() / "nonsense.board", data) == "schema"


EMPTY = '"gauges": [], "counters": [], "infos": [], "histograms": [], "tables": []'


def test_the_smallest_schema() -> None:
    """What the documents below are nonsense of."""
    Schema.from_json(f'{{"run": {{"run_id": "r", "rank": 0}}, {EMPTY}}}'.encode())


@pytest.mark.parametrize(
    "document",
    [
        "[]",
        "null",
        "{}",
        "[" * 100_000,
        '{"run": 3}',
        '{"run": {"run_id": "r", "rank": "0"}}',
        '{"run": {"run_id": "r", "rank": -1}}',
        *(
            f'{{"run": {{"run_id": "{name}", "rank": 0}}, {EMPTY}}}'
            for name in ("../../etc/x", "/etc/x", "", ".hidden", "a b", "a" * 101, "x\\u0000")
        ),
    ],
)
def test_schema_json_of_other_kinds(document: str) -> None:
    """Valid or endless JSON that is no schema raises the schema's error and no other."""
    with pytest.raises(BoardSchemaError):
        Schema.from_json(document.encode())


def test_other_version(tmp_path: Path, good: bytes) -> None:
    """A board of another layout version is refused by its version, with both named."""
    data = bytearray(good)
    struct.pack_into("<I", data, 8, 7)
    (tmp_path / "v.board").write_bytes(data)
    with pytest.raises(BoardVersionError, match="version 7, this reader knows 1"):
        BoardReader(tmp_path / "v.board")


def test_half_written_record_is_skipped(tmp_path: Path) -> None:
    """A record that does not match its checksum is lost; those before and after it are read."""
    feed = Feed(BoardWriter.create(tmp_path, schema()), every=10_000)
    feed.publish(10)
    reader = BoardReader(feed.writer.path)
    layout = reader.layout
    with feed.writer.path.open("r+b") as file:  # step 4 is record 2 of the cheap ring
        file.seek(layout.place(2, full=False) + layout.cheap_bytes // 2)
        file.write(b"\xff" * 16)
    poll = reader.poll()
    assert [record.step for record in poll.records] == [1, 2, 3, *range(5, 11)]
    assert poll.lost == 1


def test_half_written_live_header_leaves_the_older_one(tmp_path: Path) -> None:
    """A writer killed inside a write of the live header leaves the values of the step before."""
    feed = Feed(BoardWriter.create(tmp_path, schema()))
    feed.publish(9)
    reader = BoardReader(feed.writer.path)
    newest = reader.live()
    offset = reader.layout.live_offset + newest.update % 2 * reader.layout.live_bytes
    fd = os.open(feed.writer.path, os.O_WRONLY)
    os.pwrite(fd, b"\xaa" * 20, offset + LIVE.size)
    assert reader.live().step == 8
    os.pwrite(fd, b"\xaa" * 200, reader.layout.live_offset)
    os.pwrite(fd, b"\xaa" * 200, reader.layout.live_offset + reader.layout.live_bytes)
    os.close(fd)
    with pytest.raises(BoardCorruptError, match="neither live header"):
        reader.poll()


def test_truncated_while_open(tmp_path: Path) -> None:
    """A file that shrinks under its reader is truncated, not a crash; the writer goes on."""
    feed = Feed(BoardWriter.create(tmp_path, schema()))
    feed.publish(9)
    reader = BoardReader(feed.writer.path)
    os.truncate(feed.writer.path, 100)
    with pytest.raises(BoardTruncatedError):
        reader.poll()
    feed.publish()


def test_what_is_no_file_of_ours(tmp_path: Path) -> None:
    """Missing files, links, folders, pipes and oversized files are refused without waiting."""
    (tmp_path / "folder.board").mkdir()
    (tmp_path / "link.board").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.board")
    for name in ("none", "folder", "link", "pipe"):
        with pytest.raises(BoardMissingError):
            BoardReader(tmp_path / f"{name}.board")
    with (tmp_path / "big.board").open("wb") as file:
        file.truncate(MAXIMUM_BYTES + 1)
    with pytest.raises(BoardTruncatedError):
        BoardReader(tmp_path / "big.board")
    (tmp_path / "other.board").write_bytes(b"#!/bin/sh\n".ljust(4096))
    with pytest.raises(BoardMagicError):
        BoardReader(tmp_path / "other.board")


def test_a_signed_record_of_another_kind_is_lost(tmp_path: Path) -> None:
    """A full table announced in the cheap ring would be read past its end: the record does not count."""
    feed = Feed(BoardWriter.create(tmp_path, schema()), every=10_000)
    feed.publish(3)
    reader = BoardReader(feed.writer.path)
    place, size = reader.layout.place(1, full=False), reader.layout.cheap_bytes
    data = bytearray(feed.writer.path.read_bytes()[place : place + size])
    data[RECORD.size] = TableKind.FULL
    struct.pack_into("<I", data, 0, zlib.crc32(data[4:]))
    with feed.writer.path.open("r+b") as file:
        file.seek(place)
        file.write(data)
    poll = reader.poll()
    assert [record.step for record in poll.records] == [1, 2]
    assert poll.lost == 1
