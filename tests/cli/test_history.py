"""``optwatch report`` and ``optwatch export``: a stored run as a page and as a table, and what is no stored run."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from optwatch.cli.app import run as command
from optwatch.exporters.store import LocalStore, find_run
from store_samples import Clock, fill, snapshot


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with one run, whose loss is once NaN and once infinite."""
    monkeypatch.setenv("OPTWATCH_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    clock = Clock()
    store = LocalStore(tmp_path / "store", clock=clock)
    fill(store, clock, 10)
    for sick in (math.nan, math.inf):
        clock.now += 1
        store.accept(snapshot(loss=sick))
    store.close()
    return tmp_path / "store"


@pytest.mark.parametrize("name", [None, "run-1", "run", "store/run-1.sqlite"])
def test_a_run_is_found(runs: Path, name: str | None) -> None:
    """The newest, by id, by the beginning of one, by file."""
    assert find_run(name).resolve() == runs / "run-1.sqlite"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "other"], "no run 'other' in"),
        (["report", "./missing.sqlite"], "there is no such file"),
        (["report", "-o", "no/such/place.html"], "No such file or directory; name another with -o"),
        (["export"], "give --csv or --parquet"),
        (["export", "--parquet"], "needs a file to write to"),
        (["export", "--csv", "-o", "no/such/place.csv"], "No such file or directory"),
        (["export", "--csv", "-o", "store"], "is a directory"),
        (["export", "--csv", "-o", "/dev/full"], "/dev/full cannot be written: No space left on device"),
        (["export", "--parquet", "-o", "/dev/full"], "/dev/full cannot be written: No space left"),
        (["report", "-o", "/dev/full"], "/dev/full cannot be written: No space left on device"),
        (["report", "/"], "there is no such file"),
        (["report", "store"], "no run 'store' in"),
        (["report", "rün"], "no run 'rün' in"),
        (["report", "run-1", "run-2"], "unexpected extra argument"),
        (["report", "--nope"], "No such option"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    """One line that says what is wrong, and an exit code that is not zero."""
    assert command(arguments) != 0
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            "UPDATE facts SET value = '2' WHERE name = 'format'",
            "is of format 2, this optwatch reads format 1",
        ),
        ("DELETE FROM facts", "is of format unknown"),
        ("DROP TABLE buckets", "cannot be read as a stored run: no such table"),
        ("UPDATE series SET labels = '[1,2' WHERE id = 1", "cannot be read as a stored run"),
        ("UPDATE series SET labels = '[1,2]' WHERE id = 1", "cannot be read as a stored run"),
        ("UPDATE series SET level = 'x'", "cannot be read as a stored run"),
        ("UPDATE buckets SET low = 'x'", "a bucket holds what is no number"),
        ("UPDATE buckets SET last = x'00'", "a bucket holds what is no number"),
        (0.5, "cannot be read as a stored run"),
        (0.0, "cannot be read as a stored run"),
        (None, "cannot be read as a stored run"),
    ],
)
def test_a_damaged_file(
    runs: Path, capsys: pytest.CaptureFixture[str], damage: str | float | None, message: str
) -> None:
    """One line that names it, and what was exported before stays: changed by SQL, cut to a part, noise in it."""
    path = runs / "run-1.sqlite"
    if isinstance(damage, str):
        with closing(sqlite3.connect(path)) as database, database:
            database.execute(damage)
    else:
        content = path.read_bytes()
        cut = content[: int(damage * len(content))] if damage is not None else content[:4096]
        path.write_bytes(cut + (b"" if damage is not None else os.urandom(len(content) - 4096)))
    Path("old.csv").write_text("from before")
    for arguments in (["report"], ["export", "--csv"], ["export", "--parquet"]):
        assert command([*arguments, "-o", "old.csv"]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert str(path) in error
        assert error.count("\n") == 1
    assert Path("old.csv").read_text() == "from before"
    assert sorted(one.name for one in Path().iterdir()) == ["old.csv", "store"]


def test_a_link_is_written_to(tmp_path: Path) -> None:
    """Such as /dev/stdout: it is not replaced by a file."""
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "target").write_text("")
    assert command(["export", "--csv", "-o", "link"]) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text().startswith("time,seconds")


def test_a_file_that_nobody_writes_is_left_as_it_is(runs: Path) -> None:
    """Reading makes no files beside it, and a disk that is read-only will do."""
    before = sorted(runs.iterdir())
    assert command(["export", "--csv", "-o", "run.csv"]) == 0
    assert sorted(runs.iterdir()) == before


def test_several_runs_with_one_beginning(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Are listed."""
    (runs / "run-2.sqlite").write_bytes((runs / "run-1.sqlite").read_bytes())
    assert command(["report", "run"]) != 0
    assert "several runs begin with 'run'" in capsys.readouterr().err


def test_csv(capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each bucket; NaN is counted and has no mean."""
    assert command(["export", "--csv"]) == 0
    rows = [
        row
        for row in csv.DictReader(io.StringIO(capsys.readouterr().out))
        if row["metric"] == "optwatch.loss"
    ]
    assert [row["mean"] for row in rows[:3]] == ["0.0", "1.0", "2.0"]
    assert (rows[10]["nan"], rows[10]["mean"], rows[11]["maximum"]) == ("1", "", "inf")
    assert json.loads(rows[0]["labels"]) == {"rank": "0"}


def test_parquet(tmp_path: Path) -> None:
    """The same rows, typed."""
    import pyarrow.parquet as pq

    assert command(["export", "run-1", "--parquet", "-o", "run.parquet"]) == 0
    table = pq.read_table(tmp_path / "run.parquet")
    rows = [row for row in table.to_pylist() if row["metric"] == "optwatch.loss"]
    assert [row["last"] for row in rows[:3]] == [0.0, 1.0, 2.0]
    assert rows[10]["last"] is None
    assert table.schema.metadata[b"run_id"] == b"run-1"


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One page that asks for nothing outside itself."""
    assert command(["report"]) == 0
    assert capsys.readouterr().out == "run-1.html\n"
    page = (tmp_path / "run-1.html").read_text()
    assert "optwatch.step_duration" in page
    assert "src=" not in page.replace("img-src", "")
    assert "url(" not in page
    assert 'href="http' not in page
