"""``optwatch report`` and ``optwatch export``: what the local store has of a run, as a page or as a table."""

from __future__ import annotations

import csv
import json
import secrets
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO

import click

from optwatch.exporters.store import RunFile, StoreError, curves, find_run
from optwatch.pages import report_page

COLUMNS = ("time", "seconds", "metric", "labels", "count", "nan", "mean", "minimum", "maximum", "last")
_ROWS_AT_ONCE = 1 << 16  # of a table that may have millions


def write_report(run: str | None, output: Path | None) -> Path:
    """Write the report of a run (None: the newest) and return where it is.

    Raises:
        click.ClickException: no such run, or the page cannot be written.
    """
    with _open(run) as file:
        name = file.path.stem if file.path else "run"
        page = report_page(file.facts.get("run_id", name), file.facts, curves(file))
        output = output or Path(f"{name}.html")  # not what the file says of itself, which may be a path
    with _whole(output) as place:
        place.write_bytes(page)
    return output


def write_csv(run: str | None, output: Path | None) -> None:
    """Write the history of a run as CSV with the columns `COLUMNS`, one row a bucket, to a file or to stdout."""
    with _open(run) as file:
        if output is None:
            _write_csv(file, sys.stdout)
            return
        with _whole(output) as place, place.open("w", newline="", encoding="utf-8") as stream:
            _write_csv(file, stream)


def write_parquet(run: str | None, output: Path) -> None:
    """Write the same table as Parquet.

    Raises:
        click.ClickException: pyarrow is not installed, no such run, or the file cannot be written.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 - a large library that only this command needs
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise click.ClickException("--parquet needs pyarrow: pip install 'optwatch[parquet]'") from error
    numbers, text, whole = pa.float64(), pa.string(), pa.int64()
    kinds = (numbers, numbers, text, text, whole, whole, *[numbers] * 4)
    # Given a path pyarrow would remove it when a write fails, a device as well.
    with _open(run) as file, _whole(output) as place, place.open("wb") as stream:
        schema = pa.schema(list(zip(COLUMNS, kinds, strict=True)), metadata=file.facts)
        with pq.ParquetWriter(stream, schema) as writer:
            rows = _rows(file)
            while part := list(islice(rows, _ROWS_AT_ONCE)):
                columns = zip(*part, strict=True)
                arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


@contextmanager
def _open(run: str | None) -> Iterator[RunFile]:
    """A stored run; what is wrong with it is one line for the user."""
    try:
        with closing(RunFile(find_run(run), read_only=True)) as file:
            yield file
    except StoreError as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """Where to write what is to be at ``output``: a file that was there is replaced when all is written, not before."""
    # A link, such as /dev/stdout, a pipe or a device is written to and not replaced.
    plain = not output.is_symlink() and (output.is_file() or not output.exists())
    place = output.with_name(f".{output.name}.{secrets.token_hex(4)}") if plain else output
    try:
        yield place
        if plain:
            place.replace(output)
    except OSError as error:
        raise click.ClickException(
            f"{output} cannot be written: {error.strerror or error}; name another with -o"
        ) from error
    finally:
        if plain:
            with suppress(OSError):
                place.unlink()


def _write_csv(file: RunFile, stream: IO[str]) -> None:
    writer = csv.writer(stream)
    writer.writerow(COLUMNS)
    writer.writerows(_rows(file))
    stream.flush()


def _rows(file: RunFile) -> Iterator[tuple[object, ...]]:
    for (metric, labels), buckets in file.buckets():
        text = json.dumps(dict(labels))
        for one in buckets:
            mean = one.mean if one.count else None
            yield one.start, one.seconds, metric, text, one.count, one.sick, mean, one.low, one.high, one.last
