"""Reading back what a watch published."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from optwatch.board import BoardReader, Record


class Published(NamedTuple):
    """The newest values of a board; series are keyed by name and the values of their own labels."""

    reader: BoardReader
    records: list[Record]
    gauges: dict[tuple[str, ...], float]
    counters: dict[tuple[str, ...], float]


def published(directory: Path) -> Published:
    """What the only board of ``directory`` says."""
    (path,) = directory.glob("*.board")
    reader = BoardReader(path)
    poll = reader.poll()
    newest = poll.records[-1].gauges if poll.records else [float("nan")] * len(reader.schema.gauges)
    return Published(
        reader,
        list(poll.records),
        {_key(series): float(value) for series, value in zip(reader.schema.gauges, newest, strict=True)},
        {
            _key(series): float(value)
            for series, value in zip(reader.schema.counters, poll.live.counters, strict=True)
        },
    )


def _key(series) -> tuple[str, ...]:
    return series.name.removeprefix("optwatch."), *series.labels.values()
