"""The local store: what goes in comes out, bounded in size, whatever happens to the process or the disk."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optwatch.exporters.store import LocalStore, RunFile, StoreError, curves
from store_samples import GPU, LOSS, Clock, fill, snapshot, stored


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TestRunFile:
    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.tuples(st.integers(0, 200), st.floats(allow_infinity=True, allow_nan=True)),
            min_size=1,
            max_size=60,
        ),
        st.integers(0, 4),
    )
    def test_no_value_is_lost(self, values: list[tuple[int, float]], halvings: int) -> None:
        """At every resolution: counts, sums and extremes over all buckets are those of the values."""
        file = RunFile(None)
        for offset, value in values:
            file.add(1e9 + offset, [(LOSS, value)])
        file.flush()
        for _ in range(halvings):
            file._halve()
        ((key, buckets),) = file.buckets()
        file.close()
        numbers = [value for _, value in values if not math.isnan(value)]
        assert key == LOSS
        assert {bucket.seconds for bucket in buckets} == {2.0**halvings}
        assert [bucket.start for bucket in buckets] == sorted(
            {(1e9 + offset) // 2**halvings * 2**halvings for offset, _ in values}
        )
        assert sum(bucket.count for bucket in buckets) == len(numbers)
        assert sum(bucket.sick for bucket in buckets) == len(values) - len(numbers)
        assert all(isinstance(bucket.mean, float) for bucket in buckets)  # +Inf beside -Inf, too
        if numbers:
            assert min(b.low for b in buckets if b.low is not None) == min(numbers)
            assert max(b.high for b in buckets if b.high is not None) == max(numbers)
        newest = max(offset for offset, _ in values)
        last = [value for offset, value in values if offset == newest][-1]
        assert buckets[-1].last == (None if math.isnan(last) else last)

    def test_the_size_is_bounded(self, tmp_path: Path) -> None:
        """Five times more than fits: the file stays below its limit, the run is whole, extremes are kept."""
        limit = 200_000
        file = RunFile(tmp_path / "run.sqlite", limit)
        keys = [("optwatch.loss", (("rank", str(rank)),)) for rank in range(20)]
        largest = 0
        for i in range(1000):
            value = 1e6 if i == 333 else float(i)
            file.add(1e9 + i, [(key, value) for key in keys])
            if i % 10 == 9:
                file.flush()
                largest = max(largest, file.used_bytes)
        file.close()
        assert largest < 1.2 * limit
        assert (tmp_path / "run.sqlite").stat().st_size < 1.3 * limit
        for buckets in stored(tmp_path / "run.sqlite").values():
            assert sum(bucket.count for bucket in buckets) == 1000
            assert max(bucket.high or 0.0 for bucket in buckets) == 1e6
            assert buckets[0].start <= 1e9
            assert buckets[-1].start + buckets[-1].seconds > 1e9 + 999

    def test_a_late_series_is_as_coarse_as_the_others(self) -> None:
        """Or a rank that joins late would fill the file alone."""
        file = RunFile(None)
        file.add(1e9, [(LOSS, 1.0)])
        file.flush()
        file._halve()
        file.add(1e9, [(GPU, 1.0)])
        assert {b.seconds for _, buckets in file.buckets() for b in buckets} == {2.0}

    @pytest.mark.parametrize("damage", ["noise", "empty", "version", "missing"])
    def test_what_is_no_stored_run_is_refused(self, tmp_path: Path, damage: str) -> None:
        """With its name, and what was expected."""
        path = tmp_path / "run.sqlite"
        if damage == "version":
            RunFile(path).close()
            with sqlite3.connect(path) as database:
                database.execute("UPDATE facts SET value = '99' WHERE name = 'format'")
            database.close()
        elif damage != "missing":
            path.write_bytes(b"" if damage == "empty" else b"noise" * 1000)
        with pytest.raises(StoreError, match=r"run\.sqlite"):
            RunFile(path, read_only=True)


class TestLocalStore:
    def test_a_run_is_kept(self, tmp_path: Path, clock: Clock) -> None:
        """Values of its ranks and of the node, in a private directory, with facts about it."""
        store = LocalStore(tmp_path / "store", clock=clock)
        fill(store, clock, 20)
        store.close()
        assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700
        found = stored(tmp_path / "store" / "run-1.sqlite")
        assert [bucket.last for bucket in found[LOSS]] == [float(i) for i in range(20)]
        assert len(found[GPU]) == 20
        file = RunFile(tmp_path / "store" / "run-1.sqlite", read_only=True)
        assert file.facts["run_id"] == "run-1"
        assert file.facts["job_id"] == "7"
        file.close()

    def test_a_rank_that_ended_has_no_more_history(self, tmp_path: Path, clock: Clock) -> None:
        """Its last values are kept once; that the agent goes on serving them is no news."""
        store = LocalStore(tmp_path, clock=clock)
        fill(store, clock, 3)
        for _ in range(10):
            clock.now += 1
            store.accept(snapshot(up=0.0))
        store.close()
        found = stored(tmp_path / "run-1.sqlite")
        assert len(found[LOSS]) == 4
        assert found["optwatch.rank_up", (("rank", "0"),)][-1].last == 0.0

    def test_what_is_served_again_goes_on(self, tmp_path: Path, clock: Clock) -> None:
        """An agent that is started anew adds to the same file; so does a clock that was set back."""
        for moments in (5, 5):
            store = LocalStore(tmp_path, clock=clock)
            fill(store, clock, moments)
            store.close()
            clock.now -= 2
        assert sum(bucket.count for bucket in stored(tmp_path / "run-1.sqlite")[LOSS]) == 10

    def test_the_oldest_runs_make_room(self, tmp_path: Path, clock: Clock) -> None:
        """All files together stay below the limit; what is still written is never removed."""
        for i in range(5):
            path = tmp_path / f"old-{i}.sqlite"
            path.write_bytes(bytes(100_000))
            os.utime(path, (1000 + i, 1000 + i))
        store = LocalStore(tmp_path, run_limit=200_000, total_limit=450_000, clock=clock)
        fill(store, clock, 1)
        store.close()
        assert sorted(path.name for path in tmp_path.glob("*.sqlite")) == [
            "old-3.sqlite",
            "old-4.sqlite",
            "run-1.sqlite",
        ]

    def test_a_disk_that_refuses_is_counted_and_left_alone(self, tmp_path: Path, clock: Clock) -> None:
        """Nothing is raised; when the disk works again the run goes on."""
        place = tmp_path / "store"
        place.write_text("a file where the directory should be")
        store = LocalStore(place, clock=clock)
        fill(store, clock, 20)
        assert store.failures == 1
        place.unlink()
        fill(store, clock, 40)
        store.close()
        assert store.failures == 1
        assert LOSS in stored(place / "run-1.sqlite")

    def test_a_clock_that_is_set_back_after_a_failure(self, tmp_path: Path, clock: Clock) -> None:
        """Is no reason to store nothing for a day."""
        place = tmp_path / "store"
        place.write_text("a file where the directory should be")
        store = LocalStore(place, clock=clock)
        fill(store, clock, 1)
        place.unlink()
        clock.now -= 86400
        fill(store, clock, 3)
        store.close()
        assert LOSS in stored(place / "run-1.sqlite")

    def test_a_file_of_another_version_takes_no_other_run_with_it(self, tmp_path: Path, clock: Clock) -> None:
        """It is left as it is, counted, and the other run is stored."""
        (tmp_path / "run-0.sqlite").write_bytes(b"noise" * 1000)
        store = LocalStore(tmp_path, clock=clock)
        for _ in range(40):
            clock.now += 1
            found = snapshot()
            others = {name: [replace(p, labels={**p.labels, "run_id": "run-0"}) for p in points]
                      for name, points in found.items() if name != "optwatch.device_up"}  # fmt: skip
            store.accept({name: [*points, *others.get(name, ())] for name, points in found.items()})
        store.close()
        assert store.failures == 1
        assert (tmp_path / "run-0.sqlite").read_bytes() == b"noise" * 1000
        assert sum(bucket.count for bucket in stored(tmp_path / "run-1.sqlite")[LOSS]) == 40

    def test_reading_while_a_run_ends(self, clock: Clock) -> None:
        """Whoever draws a run that is closed meanwhile is told, and nothing crashes."""

        def draw(run: RunFile) -> int:
            return len(list(curves(run)))

        for _ in range(20):
            store = LocalStore(None, clock=clock)
            fill(store, clock, 30)
            with ThreadPoolExecutor() as pool:
                drawn = [pool.submit(draw, store.runs["run-1"]) for _ in range(4)]
                store.close()
            ends = [one.exception() for one in drawn]
            assert all(end is None or isinstance(end, StoreError) for end in ends), ends

    def test_in_memory(self, clock: Clock) -> None:
        """Without a directory the history is there while the run is."""
        store = LocalStore(None, clock=clock)
        fill(store, clock, 10)
        assert len(list(curves(store.runs["run-1"]))) > 0
        store.accept({})
        assert store.runs == {}
        store.close()

    def test_a_kill_leaves_a_file_that_reads(self, tmp_path: Path) -> None:
        """SIGKILL at any moment, in the middle of halving too: whole, and at most the last seconds are missing."""
        writer = """
import sys
from pathlib import Path
from optwatch.exporters.store import RunFile
file = RunFile(Path(sys.argv[1]), 150_000)
for i in range(10**9):
    file.add(1e9 + i, [(("optwatch.loss", (("rank", str(rank)),)), float(i)) for rank in range(20)])
    if i % 5 == 4:
        file.flush()
        print(i + 1, flush=True)
"""
        for delay in (0.0, 0.05, 0.11, 0.23):
            path = tmp_path / f"{delay}.sqlite"
            process = subprocess.Popen(
                [sys.executable, "-c", writer, str(path)], stdout=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            said = int(process.stdout.readline())
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            said = int((process.stdout.read().split() or [said])[-1])
            process.stdout.close()
            process.wait()
            found = stored(path)
            assert len(found) == 20
            assert all(sum(bucket.count for bucket in buckets) >= said for buckets in found.values())


class TestCurves:
    def test_gauges_rates_and_means(self, tmp_path: Path, clock: Clock) -> None:
        """A counter becomes its increase a second, a histogram the mean of what it saw."""
        store = LocalStore(tmp_path, clock=clock)
        fill(store, clock, 10)
        found = {curve["metric"]: curve for curve in curves(store.runs["run-1"])}
        store.close()
        assert found["optwatch.loss"]["mean"] == [float(i) for i in range(10)]
        assert found["optwatch.steps"]["mean"] == [10.0] * 9
        assert found["optwatch.step_duration"]["mean"] == [0.25] * 9
        assert "optwatch.run" not in found

    def test_rates_are_over_more_than_a_second(self) -> None:
        """A step every three seconds is no zero between ones; what is asked for later agrees with the whole."""
        with closing(RunFile(None)) as run:
            for i in range(120):
                run.add(
                    1e9 + i,
                    [(("optwatch.steps", (("rank", "0"),)), float(i // 3 if i < 60 else i // 3 - 20))],
                )
            (whole,) = curves(run)
            (part,) = curves(run, 1e9 + 100)
        rates = dict(zip(whole["time"], whole["mean"], strict=True))
        settled = [rate for time, rate in rates.items() if (time - 1e9) % 60 >= 15]
        assert all(rate == pytest.approx(1 / 3, abs=0.07) for rate in settled)
        assert all(rate is not None and rate >= 0 for rate in rates.values())
        assert 1e9 + 60 not in rates  # the counter began anew
        assert dict(zip(part["time"], part["mean"], strict=True)) == {
            time: rate for time, rate in rates.items() if time >= 1e9 + 100
        }
        assert (whole["total"], whole["odd"]) == (19.0, "")

    def test_thinning_keeps_extremes(self, clock: Clock) -> None:
        """A spike of one second is still there among few points."""
        store = LocalStore(None, clock=clock)
        fill(store, clock, 50)
        clock.now += 1
        store.accept(snapshot(loss=1e9))
        fill(store, clock, 50)
        found = {curve["metric"]: curve for curve in curves(store.runs["run-1"], points=10)}["optwatch.loss"]
        store.close()
        assert len(found["time"]) <= 10
        assert max(value for value in found["high"] if value is not None) == 1e9
        assert min(value for value in found["low"] if value is not None) == 0.0
