"""`RunFile`: the history of one run in SQLite, halved in resolution whenever it outgrows its bound.

Time is cut into buckets. A series starts with buckets of `BASE_SECONDS`; when the file is larger than its limit the
buckets of every series are merged in pairs, so a long run is coarser, never cut off, and no extreme is lost: a bucket
keeps minimum and maximum. Each series is merged in a transaction of its own, so that the write-ahead log stays small
and a kill at any moment leaves a file that reads well.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

BASE_SECONDS = 1.0
FORMAT = 1
_LEVELS = 30  # halvings; beyond lie centuries
_NUMBERS = (int, float, type(None))

_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS series (
    id INTEGER PRIMARY KEY, metric TEXT, labels TEXT, level INTEGER DEFAULT 0, UNIQUE (metric, labels));
CREATE TABLE IF NOT EXISTS buckets (
    series INTEGER, bucket INTEGER, count INTEGER, sick INTEGER, total REAL, low REAL, high REAL, last REAL,
    PRIMARY KEY (series, bucket)) WITHOUT ROWID;
"""

# 2 ** shift buckets become one; `last` is that of the newest.
_MERGED = """
SELECT part.number, part.count, part.sick, part.total, part.low, part.high, newest.last
FROM (
    SELECT bucket >> :shift AS number, max(bucket) AS newest, sum(count) AS count, sum(sick) AS sick,
           iif(count(total) < count(*), NULL, sum(total)) AS total, min(low) AS low, max(high) AS high
    FROM buckets WHERE series = :series AND bucket >= :first GROUP BY bucket >> :shift) AS part
JOIN buckets AS newest ON newest.series = :series AND newest.bucket = part.newest
ORDER BY part.number
"""

# Negative numbers keep the merged ones apart from those they are made of, which go in between.
_HALVE = f"""
INSERT INTO buckets SELECT :series, -1 - number, count, sick, total, low, high, last FROM ({_MERGED})
"""  # noqa: S608 - made of the constant above

_MERGE = """
INSERT INTO buckets VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
    count = count + excluded.count, sick = sick + excluded.sick, total = total + excluded.total,
    low = min(ifnull(low, excluded.low), ifnull(excluded.low, low)),
    high = max(ifnull(high, excluded.high), ifnull(excluded.high, high)), last = excluded.last
"""

#: Name of the metric (``#sum`` and ``#count`` for the parts of a histogram) and its labels as sorted pairs.
Key: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]


class StoreError(Exception):
    """A stored run cannot be read or found; the message is one line that says which and what to do."""


@dataclass
class Bucket:
    """What a series showed in one stretch of time.

    Attributes:
        start, seconds: Unix time at which it begins, and its length.
        count, sick: values that were numbers, and values that were NaN.
        total, low, high: over the numbers; low and high are None without any, total where +Inf met -Inf.
        last: the newest value; None if it was NaN, as SQLite keeps it.
    """

    start: float
    seconds: float
    count: int = 0
    sick: int = 0
    total: float | None = 0.0
    low: float | None = None
    high: float | None = None
    last: float | None = None

    @property
    def mean(self) -> float:
        """Mean of the numbers, NaN without any or where infinite ones cancel."""
        return self.total / self.count if self.count and self.total is not None else math.nan

    def add(self, value: float) -> None:
        """Take one more value in."""
        if math.isnan(value):
            self.last = None
            self.sick += 1
            return
        self.last = value
        self.count += 1
        self.total = (self.total or 0.0) + value
        self.low = value if self.low is None else min(self.low, value)
        self.high = value if self.high is None else max(self.high, value)


class RunFile:
    """The file of one run; all methods may be called from any thread.

    Args:
        path: the file; None keeps the history in memory.
        limit: bytes above which the resolution is halved.
        read_only: open what is there and change nothing.

    Raises:
        StoreError: the file is not there, is no stored run, or was written by another version.
        sqlite3.Error: the file system refuses.
    """

    def __init__(self, path: Path | None, limit: int = 36 << 20, *, read_only: bool = False) -> None:
        self.path, self._limit, self._read_only = path, limit, read_only
        self._guard = threading.Lock()
        self._open: dict[Key, Bucket] = {}
        self._series: dict[Key, tuple[int, int]] = {}  # id, level
        self._database = self._connect(path)
        try:
            with self._reading():
                if not read_only:
                    self._prepare()
                self._check()
                self._series = {key: (ident, level) for ident, key, level in self._known()}
        except (StoreError, sqlite3.Error):
            self._database.close()
            raise

    # ---- writing -------------------------------------------------------------------------------------------------

    def add(self, now: float, values: Iterable[tuple[Key, float]]) -> None:
        """Take the values of one moment in; buckets that are over are written by `flush`."""
        with self._guard:
            for key, value in values:
                _, level = self._series.get(key) or self._register(key)
                seconds = BASE_SECONDS * 2**level
                start = now // seconds * seconds
                bucket = self._open.get(key)
                if bucket is None or bucket.start != start or bucket.seconds != seconds:
                    if bucket is not None:
                        self._write(key, bucket)
                    bucket = self._open[key] = Bucket(start, seconds)
                bucket.add(value)

    def flush(self) -> None:
        """Write what was taken in, and halve the resolution if the file has outgrown its limit."""
        with self._guard:
            for key, bucket in self._open.items():
                self._write(key, bucket)
            self._open.clear()
            self._database.commit()
            if not self._read_only and self.used_bytes > self._limit:
                self._halve()

    def describe(self, facts: Mapping[str, str]) -> None:
        """Keep facts about the run; a fact given again replaces the old one."""
        with self._guard:
            self._database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())

    def close(self) -> None:
        """Write what is left and let go of the file."""
        try:
            self.flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of the file without writing what is left."""
        with self._guard:  # somebody may be reading
            self._open.clear()
            self._database.close()

    # ---- reading -------------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Bytes of the database that hold something."""
        pages, free, size = (
            self._database.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    @property
    def facts(self) -> dict[str, str]:
        """What was said of the run."""
        with self._guard, self._reading():
            return {str(name): str(value) for name, value in self._database.execute("SELECT * FROM facts")}

    @property
    def width(self) -> int:
        """How many series there are."""
        return len(self._series)

    def buckets(self, since: float = 0.0, points: int | None = None) -> Iterator[tuple[Key, list[Bucket]]]:
        """Every series with its buckets that end after a Unix time, oldest first.

        With ``points`` neighbours are merged, in powers of two, until a series has no more than about so many.
        Raises StoreError where the file is damaged, or was closed meanwhile.
        """
        with self._reading():
            if self._open:
                self.flush()
        with self._guard, self._reading():
            known = self._known()
        for ident, key, level in known:
            with self._guard, self._reading():
                shift = 0 if points is None else self._shift(ident, points)
                seconds = BASE_SECONDS * 2 ** (level + shift)
                arguments = {"series": ident, "shift": shift, "first": int(since // seconds) << shift}
                rows = self._database.execute(_MERGED, arguments).fetchall()
                if not all(isinstance(value, _NUMBERS) for row in rows for value in row):
                    raise ValueError("a bucket holds what is no number")
                found = [Bucket(row[0] * seconds, seconds, *row[1:]) for row in rows]
            yield key, found

    # ---- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What damage looks like: to SQLite, or in what it hands out. What the file system does to a writer passes."""
        try:
            yield
        except (sqlite3.Error, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, sqlite3.OperationalError) and not self._read_only:
                raise
            raise StoreError(f"{self.path}: cannot be read as a stored run: {error}") from error

    def _connect(self, path: Path | None) -> sqlite3.Connection:
        if path is None:
            return sqlite3.connect(":memory:", check_same_thread=False)
        if not self._read_only:
            return sqlite3.connect(path, timeout=2.0, check_same_thread=False)
        with self._reading():
            if not path.is_file():
                raise StoreError(f"{path}: there is no such file")
            # Without a log nobody writes, and SQLite need not make files beside it to know: the disk may be read-only.
            how = "mode=ro" if Path(f"{path}-wal").exists() else "immutable=1"
            return sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, check_same_thread=False)

    def _prepare(self) -> None:
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose seconds, never the file
        self._database.executescript(_TABLES)
        self._database.execute("INSERT OR IGNORE INTO facts VALUES ('format', ?)", (str(FORMAT),))
        self._database.commit()

    def _check(self) -> None:
        found = self._database.execute("SELECT value FROM facts WHERE name = 'format'").fetchone()
        if found is None or found[0] != str(FORMAT):
            raise StoreError(
                f"{self.path}: is of format {found[0] if found else 'unknown'}, this optwatch reads format {FORMAT}"
            )

    def _known(self) -> list[tuple[int, Key, int]]:
        rows = self._database.execute("SELECT id, metric, labels, level FROM series ORDER BY id")
        return [
            (row[0], (str(row[1]), tuple(json.loads(row[2]).items())), min(row[3], _LEVELS)) for row in rows
        ]

    def _shift(self, ident: int, points: int) -> int:
        """How often the buckets of a series have to be halved to be no more than so many."""
        (count,) = self._database.execute(
            "SELECT count(*) FROM buckets WHERE series = ?", (ident,)
        ).fetchone()
        return max(0, math.ceil(math.log2(max(1, count) / points)))

    def _register(self, key: Key) -> tuple[int, int]:
        """A new series starts at the level of the coarsest, or it alone would fill the file."""
        level = max((level for _, level in self._series.values()), default=0)
        row = self._database.execute(
            "INSERT INTO series (metric, labels, level) VALUES (?, ?, ?)",
            (key[0], json.dumps(dict(key[1])), level),
        )
        assert row.lastrowid is not None
        self._series[key] = (row.lastrowid, level)
        return self._series[key]

    def _write(self, key: Key, bucket: Bucket) -> None:
        ident, level = self._series[key]
        number = int(bucket.start // (BASE_SECONDS * 2**level))
        self._database.execute(
            _MERGE,
            (ident, number, bucket.count, bucket.sick, bucket.total, bucket.low, bucket.high, bucket.last),
        )

    def _halve(self) -> None:
        for key, (ident, level) in self._series.items():
            with self._database:  # one transaction a series
                self._database.execute(_HALVE, {"series": ident, "shift": 1, "first": 0})
                self._database.execute("DELETE FROM buckets WHERE series = ? AND bucket >= 0", (ident,))
                self._database.execute("UPDATE buckets SET bucket = -1 - bucket WHERE series = ?", (ident,))
                self._database.execute("UPDATE series SET level = ? WHERE id = ?", (level + 1, ident))
            self._series[key] = (ident, level + 1)
