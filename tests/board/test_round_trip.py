"""What a writer publishes is what a reader gets."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from board_samples import Feed, schema
from optwatch.board import (
    MAXIMUM_BYTES,
    BoardBusyError,
    BoardReader,
    BoardSchemaError,
    BoardSpaceError,
    BoardTooLargeError,
    BoardWriter,
    HistogramSeries,
    Schema,
    Series,
    State,
    Table,
    TensorInfo,
    apply_folds,
    fit,
    fold_to_groups,
)
from optwatch.metrics.fields import row_fields

# Python 3.12 and later warn of forking a process with threads; forking is what is tested here.
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

words = st.text(min_size=1, max_size=8)
labels = st.dictionaries(words, words, max_size=3)
series = st.lists(st.builds(Series, words, labels), max_size=5, unique_by=lambda s: s.key).map(tuple)
bounds = (
    st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=6, unique=True).map(sorted).map(tuple)
)
histograms = st.lists(
    st.builds(HistogramSeries, words, labels, bounds), max_size=3, unique_by=lambda s: s.key
).map(tuple)
tensors = st.lists(st.builds(TensorInfo, words, words, st.integers(0, 1 << 40)), max_size=12).map(tuple)


@st.composite
def tables(draw: st.DrawFn) -> tuple[Table, ...]:
    """Up to three tables with different optimizers and up to three slots each."""
    made = []
    for name in draw(st.lists(words, max_size=3, unique=True)):
        slots = tuple(draw(st.lists(words, max_size=3, unique=True)))
        seconds = tuple(draw(st.booleans()) for _ in slots)
        made.append(Table(name, slots, seconds, draw(tensors), draw(st.integers(1, 64))))
    return tuple(made)


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    """Any schema that fits a board."""
    return Schema(
        run={
            "run_id": "r",
            "rank": draw(st.integers(0, 9999)),
            "host": draw(words),
            "pid": draw(st.integers()),
        },
        gauges=draw(series),
        counters=draw(series),
        infos=draw(series),
        histograms=draw(histograms),
        tables=draw(tables()),
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(schemas())
def test_schema_survives_json(made: Schema) -> None:
    """A schema is the same after writing and reading it."""
    assert Schema.from_json(made.to_json()) == made


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(made=schemas(), data=st.data(), seed=st.integers(0, 1 << 32))
def test_any_board_survives_the_file(tmp_path_factory, made: Schema, data: st.DataObject, seed: int) -> None:
    """Random schemas and records, NaN and Inf included, come back bit for bit and in order."""
    directory = tmp_path_factory.mktemp("boards")
    writer = BoardWriter.create(directory, made)
    reader = BoardReader(writer.path)
    random = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        found = random.normal(size=shape) * 10.0 ** random.integers(-300, 300, size=shape)
        return np.where(random.random(shape) < 0.1, random.choice([np.nan, np.inf, -0.0]), found)

    kinds = st.sampled_from(["absent", "cheap", "full"])
    sent = []
    for step in range(data.draw(st.integers(1, 4))):
        rows = [
            {"absent": None, "cheap": values(len(t.tensors), 3), "full": values(len(t.tensors), t.width)}[
                data.draw(kinds)
            ]
            for t in made.tables
        ]
        gauges, counters = values(len(made.gauges)), values(len(made.counters))
        sums = [(values(len(h.bounds) + 1), 1.5) for h in made.histograms]
        assert writer.publish(step, step + 0.5, gauges, rows, counters, sums)
        sent.append((step, gauges, rows))
    poll = reader.poll()
    assert poll.lost == 0
    assert [record.step for record in poll.records] == [step for step, _, _ in sent]
    for record, (step, gauges, rows) in zip(poll.records, sent, strict=True):
        assert record.time == step + 0.5
        np.testing.assert_array_equal(record.gauges, gauges)
        for found, given_rows in zip(record.tables, rows, strict=True):
            assert (found is None) == (given_rows is None)
            np.testing.assert_array_equal(found, given_rows)
    np.testing.assert_array_equal(poll.live.counters, counters)
    for (counts, total), (wanted, _) in zip(poll.live.histograms, sums, strict=True):
        np.testing.assert_array_equal(counts, wanted)
        assert total == 1.5
    assert reader.poll().records == ()
    reader.close()
    writer.close()
    writer.path.unlink()


def test_slow_reader_loses_records_but_no_counts(tmp_path: Path) -> None:
    """After more steps than the ring holds, the newest records and every counter are there."""
    feed = Feed(BoardWriter.create(tmp_path, schema()))
    reader = BoardReader(feed.writer.path)
    feed.publish(500)
    poll = reader.poll()
    assert poll.records[-1].step == 500
    assert poll.lost == 500 - len(poll.records) > 0
    assert poll.live.counters[0] == 500
    assert poll.live.histograms[0][0].sum() == 500
    assert poll.live.histograms[0][1] == pytest.approx(10.0)


def test_cheap_records_never_push_out_a_sample(tmp_path: Path) -> None:
    """The newest full statistics survive any number of steps without them."""
    feed = Feed(BoardWriter.create(tmp_path, schema()), every=10_000)
    feed.publish(3000)
    full = [r for r in BoardReader(feed.writer.path).poll().records if r.tables[0].shape[1] > 3]
    assert [record.step for record in full] == [1]


def test_restart_carries_counters_on(tmp_path: Path) -> None:
    """A new generation keeps the totals of the series both have, and its reader sees the new schema."""
    feed = Feed(BoardWriter.create(tmp_path, schema(tensors=3)))
    feed.publish(7)
    old = BoardReader(feed.writer.path)
    feed.writer.restart(schema(tensors=5))
    assert old.superseded()
    assert old.live().state is State.SUPERSEDED
    new = BoardReader(feed.writer.path)
    assert new.generation == old.generation + 1
    assert len(new.schema.tables[0].tensors) == 5
    assert new.live().counters[0] == 7
    assert new.live().histograms[0][0].sum() == 7
    feed.publish()
    poll = new.poll()
    assert [record.step for record in poll.records] == [8]
    assert poll.live.state is State.RUNNING
    assert new.alive()


def test_failed_restart_leaves_the_old_generation_writing(tmp_path: Path) -> None:
    """A schema that does not fit is refused before anything changes."""
    feed = Feed(BoardWriter.create(tmp_path, schema()))
    with pytest.raises(BoardTooLargeError, match="fold"):
        feed.writer.restart(schema(tensors=60_000))
    assert feed.publish()
    assert BoardReader(feed.writer.path).poll().live.step == 1


@pytest.mark.parametrize(("said", "state"), [("finished", State.FINISHED), ("failed", State.FAILED)])
def test_close_says_how_it_ended(tmp_path: Path, said: str, state: State) -> None:
    """The last values stay readable, the lock is gone, and later calls do nothing."""
    feed = Feed(BoardWriter.create(tmp_path, schema()))
    feed.publish(3)
    feed.writer.close(said)
    reader = BoardReader(feed.writer.path)
    assert (reader.live().state, reader.live().step, reader.alive()) == (state, 3, False)
    assert not feed.publish()
    feed.writer.close(said)
    with pytest.raises(ValueError, match=r"expected one of .*failed.*finished"):
        feed.writer.close("gone")


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    """An array that does not fit the schema is refused with both shapes, and the board stays as it was."""
    feed = Feed(BoardWriter.create(tmp_path, schema()))
    feed.publish()
    good = (np.zeros(3), [None], np.zeros(2), [(feed.durations.counts, 0.0)])
    for position, bad in enumerate((np.zeros(4), [np.zeros((3, 3))], np.zeros(1), [])):
        arguments = [*good[:position], bad, *good[position + 1 :]]
        with pytest.raises(ValueError, match="the schema has"):
            feed.writer.publish(2, 0.0, *arguments)
    assert BoardReader(feed.writer.path).poll().live.step == 1


@forks
def test_forked_child_writes_nothing(tmp_path: Path) -> None:
    """A DataLoader worker inherits the writer; nothing it does may reach the board or end its lock."""
    feed = Feed(BoardWriter.create(tmp_path, schema()))
    feed.publish()
    child = os.fork()
    if child == 0:
        silent = not feed.publish()
        feed.writer.restart(schema(tensors=2))
        feed.writer.close()
        os._exit(0 if silent else 1)
    assert os.waitpid(child, 0)[1] == 0
    reader = BoardReader(feed.writer.path)
    assert reader.alive()
    assert reader.live().step == 1
    assert reader.live().state is State.RUNNING
    assert not reader.superseded()
    assert feed.publish()


@forks
def test_a_reader_in_the_writers_process_does_not_end_its_lock(tmp_path: Path) -> None:
    """Closing any descriptor of a locked file drops the lock: readers in this process must not hold their own."""
    feed = Feed(BoardWriter.create(tmp_path, schema()))
    BoardReader(feed.writer.path).close()
    with pytest.raises(BoardBusyError):
        BoardWriter.create(tmp_path, schema())
    child = os.fork()
    if child == 0:  # record locks conflict between processes only
        fd = os.open(feed.writer.path, os.O_RDWR)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("run_id", ["", "../up", "a/b", ".hidden", "x" * 101, "new\nline"])
def test_run_id_must_be_a_plain_name(tmp_path: Path, run_id: str) -> None:
    """A run id becomes part of a file name; one that could leave the directory is refused."""
    with pytest.raises(BoardSchemaError, match="run_id"):
        BoardWriter.create(tmp_path, schema(run_id))


def test_no_room_is_an_error_at_creation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are reserved when the board is made; a limit on file sizes stands in for a full file system."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(BoardSpaceError, match="could not be reserved"):
            BoardWriter.create(tmp_path, schema())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_failing_writes_are_counted(tmp_path: Path) -> None:
    """A write that fails later returns False, is counted, and the next one goes through."""
    import resource

    feed = Feed(BoardWriter.create(tmp_path, schema()))
    feed.publish()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        assert not feed.publish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert feed.writer.write_failures == 2
    assert feed.publish()
    live = BoardReader(feed.writer.path).live()
    assert (live.step, live.write_failures) == (3, 2)


def test_blocks_are_really_allocated(tmp_path: Path) -> None:
    """A sparse file would fail in the middle of training."""
    writer = BoardWriter.create(tmp_path, schema())
    status = writer.path.stat()
    assert status.st_blocks * 512 >= status.st_size
    assert status.st_mode & 0o777 == 0o600


@settings(max_examples=50, deadline=None)
@given(groups=st.lists(words, min_size=1, max_size=30), seed=st.integers(0, 1 << 32))
def test_fold_adds_sums_and_keeps_maxima(groups: list[str], seed: int) -> None:
    """A folded row is the sum over its group, the maximum for absmax; numel adds up."""
    table = Table("o", ("m",), (False,), tuple(TensorInfo(str(i), g, i + 1) for i, g in enumerate(groups)))
    rows = np.random.default_rng(seed).random((len(groups), table.width))
    fold = fold_to_groups(table)
    assert sum(t.numel for t in fold.table.tensors) == sum(t.numel for t in table.tensors)
    folded, cheap = fold.apply(rows), fold.apply(rows[:, :3])
    for index, tensor in enumerate(fold.table.tensors):
        members = rows[[g == tensor.group for g in groups]]
        for column, name in enumerate(row_fields(("m",))):
            wanted = members[:, column].max() if name.endswith("absmax") else members[:, column].sum()
            assert folded[index, column] == pytest.approx(wanted, rel=1e-12)
        np.testing.assert_allclose(cheap[index], folded[index, :3])


@pytest.mark.parametrize(("count", "folded"), [(300, False), (5000, False), (5001, True), (60_000, True)])
def test_fit_folds_what_is_too_much(tmp_path: Path, count: int, folded: bool) -> None:
    """Up to 5,000 tensors are kept one by one; more are folded; the file never exceeds 4 MiB."""
    fitted, folds = fit(schema(tensors=count))
    assert (folds[0] is not None) == folded
    assert len(fitted.tables[0].tensors) == (6 if folded else count)
    writer = BoardWriter.create(tmp_path, fitted)
    assert writer.path.stat().st_size <= MAXIMUM_BYTES
    rows = np.ones((count, fitted.tables[0].width))
    writer.publish(1, 0.0, np.zeros(3), apply_folds(folds, [rows]), np.zeros(2), [(np.zeros(19), 0.0)])
    (record,) = BoardReader(writer.path).poll().records
    assert record.tables[0][:, 0].sum() == count
