"""From boards to the scrape, through real processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics

from agent_process import agent, eventually, scrape
from board_samples import ADAMW, BOUNDS, Feed, end, environment, schema, start_writer
from optwatch.agent.boards import Boards
from optwatch.agent.collect import Collector
from optwatch.agent.election import Election
from optwatch.agent.nvml import NvmlSampler
from optwatch.board import (
    BoardReader,
    BoardWriter,
    HistogramSeries,
    Schema,
    Series,
    Table,
    TensorInfo,
    find_agent,
)
from optwatch.board.run import run_facts
from optwatch.exporters.otlp_data import Translator
from optwatch.metrics.catalogue import CATALOGUE

RUN = {"run_id": "run", "rank": "0"}


def feed(directory: Path, steps: int = 1, **changes) -> Feed:
    """A board in this process with so many steps."""
    made = Feed(BoardWriter.create(directory, schema(**changes)))
    made.publish(steps)
    return made


def test_values_come_through(tmp_path: Path) -> None:
    """Gauges, counters, histograms, infos and formed ratios of one board, each with its expected value."""
    source = feed(tmp_path, 8)  # the newest full statistics are those of step 6
    with agent(tmp_path) as (url, _):
        page = scrape(url)
        assert page.one("optwatch_rank_up", **RUN) == 1
        assert page.one("optwatch_run_state", state="running", **RUN) == 1
        assert page.all("optwatch_run_state", **RUN) == [1, 0, 0, 0]
        assert page.one("optwatch_step", **RUN) == 8
        assert page.one("optwatch_steps_total", **ADAMW) == 8
        assert page.one("optwatch_optimizer_state_bytes", slot="exp_avg", dtype="int8", **RUN) == 1008
        assert page.one("optwatch_optimizer_info", codec="int8", **ADAMW) == 1
        assert page.one("optwatch_run_info", world_size="1", pid=str(os.getpid())) == 1
        assert page.all("optwatch_loss") == []  # NaN = absent
        assert page.one("optwatch_step_duration_seconds_count", **RUN) == 8
        assert page.one("optwatch_step_duration_seconds_bucket", le="0.01") == 0
        assert page.one("optwatch_step_duration_seconds_bucket", le="0.025") == 8
        assert page.one("optwatch_step_duration_seconds_bucket", le="+Inf") == 8
        # Two tensors a group, every field is the step's number.
        assert page.one("optwatch_gradient_norm", group="blocks_0") == pytest.approx(math.sqrt(2 * 8))
        assert page.one("optwatch_parameter_norm", group="blocks_0") == pytest.approx(math.sqrt(2 * 6))
        assert page.one("optwatch_update_quantization_error_ratio", group="blocks_5") == 1
        numel = 105 + 111
        mean = page.one("optwatch_moment_mean", group="blocks_5", slot="exp_avg_sq")
        assert mean == pytest.approx(2 * 6 / numel)
        assert page.one("optwatch_moment_absmax", group="blocks_5", slot="exp_avg") == 6
        assert page.one("optwatch_host_memory_rss_bytes", **RUN) > 10e6
        assert page.one("optwatch_build_info") == 1
        assert page.one("optwatch_nvml_errors_total") == 0
        assert page.one("optwatch_samples_dropped_total", **RUN) == 0
        source.publish()

        def newer() -> None:
            assert scrape(url).one("optwatch_step") == 9

        eventually(newer)


def test_where_a_run_is_is_told_once(tmp_path: Path) -> None:
    """Job, pod and host are on the run's info metric and on no other series."""
    where = {
        "SLURM_JOB_ID": "4711",
        "POD_NAME": "trainer-0",
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
    }
    facts = run_facts("run", where)
    BoardWriter.create(tmp_path, replace(schema(), run={**facts, "replicas": 4}))
    with agent(tmp_path) as (url, _):
        (info,) = [s for s in scrape(url).samples if s.name == "optwatch_run_info"]
        others = [s for s in scrape(url).samples if {"job_id", "pod", "host"} & s.labels.keys()]
    expected = {"job_id": "4711", "pod": "trainer-0", "host": socket.gethostname(), "world_size": "8"}
    assert {**info.labels, **expected, "rank": "3", "local_rank": "1", "replicas": "4"} == info.labels
    assert [s.name for s in others] == ["optwatch_run_info"]


def test_every_series_is_in_the_catalogue(tmp_path: Path) -> None:
    """Nothing is served that is not described, and run_id is on every series of a rank."""
    feed(tmp_path, 2)
    with agent(tmp_path) as (url, _):
        scrape(url)
        for sample in scrape(url).samples:
            spec = CATALOGUE.sample(sample.name)
            assert spec is not None, sample.name
            assert set(sample.labels) - {"le"} <= set(spec.labels)
            assert ("run_id" in sample.labels) == ("run_id" in spec.labels)


def test_killed_rank_keeps_its_last_values(tmp_path: Path) -> None:
    """After SIGKILL of the training process: rank_up 0, lost, and the step it published last."""
    process = start_writer(tmp_path)
    with agent(tmp_path) as (url, _):
        assert scrape(url).one("optwatch_rank_up") == 1
        end(process)
        last = BoardReader(tmp_path / "run-0.board").live().step

        def down() -> None:
            assert scrape(url).one("optwatch_rank_up") == 0

        eventually(down)
        page = scrape(url)
        assert page.one("optwatch_step") == last
        assert page.one("optwatch_steps_total") == last
        assert page.one("optwatch_run_state", state="lost") == 1
        assert page.all("optwatch_host_memory_rss_bytes") == []
        assert len(page.all("optwatch_moment_norm")) == 12


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_ended_run_is_forgotten_after_its_grace(tmp_path: Path, state: str) -> None:
    """A closed board says how it ended, is served for the grace period, then its series and its file are gone."""
    source = feed(tmp_path, 3)
    with agent(tmp_path, "--grace", "3") as (url, _):
        source.writer.close(state)
        eventually(lambda: _ended(url, state))
        page = scrape(url)
        assert page.one("optwatch_rank_up") == 0
        assert page.one("optwatch_step") == 3

        def gone() -> None:
            assert scrape(url).all("optwatch_rank_up") == []
            assert not list(tmp_path.glob("*.board"))

        eventually(gone)


def _ended(url: str, state: str) -> None:
    assert scrape(url).all("optwatch_run_state", state=state) == [1]


def test_long_dead_board_is_removed_at_once(tmp_path: Path) -> None:
    """A board found dead died when it was last written, not when the agent came."""
    path = feed(tmp_path, 3).writer.path
    Feed(BoardWriter.create(tmp_path, schema("alive"))).publish()
    writer = start_writer(tmp_path, "dead")
    end(writer)
    os.utime(tmp_path / "dead-0.board", (1, 1))
    with agent(tmp_path) as (url, _):
        assert scrape(url).all("optwatch_rank_up", run_id="dead") == []
    assert not (tmp_path / "dead-0.board").exists()
    assert path.exists()


def test_two_jobs_do_not_mix(tmp_path: Path) -> None:
    """Boards of different runs and ranks are kept apart by their labels."""
    feed(tmp_path, 2, run_id="one")
    feed(tmp_path, 4, run_id="two")
    feed(tmp_path, 6, run_id="two", rank=1)
    with agent(tmp_path) as (url, _):
        page = scrape(url)
    steps = {
        (r, k): page.one("optwatch_step", run_id=r, rank=k)
        for r, k in [("one", "0"), ("two", "0"), ("two", "1")]
    }
    assert list(steps.values()) == [2, 4, 6]


def test_bad_boards_are_skipped_and_counted(tmp_path: Path) -> None:
    """Each bad board is counted once by its reason, however often it is seen; the good one is served."""
    feed(tmp_path, 2)
    whole = (tmp_path / "run-0.board").read_bytes()
    other_version = bytearray(whole)
    other_version[8] = 99
    (tmp_path / "a-0.board").write_bytes(whole[:5000])
    (tmp_path / "b-0.board").write_bytes(other_version)
    (tmp_path / "c-0.board").write_bytes(os.urandom(10_000))
    (tmp_path / "d-0.board").symlink_to("/etc/passwd")
    with agent(tmp_path) as (url, _):
        time.sleep(0.3)  # several polls
        page = scrape(url)
        reasons = {
            s.labels["reason"]: s.value for s in page.samples if s.name == "optwatch_boards_skipped_total"
        }
        assert reasons == {"truncated": 1, "version": 1, "not_a_board": 1, "missing": 1}
        assert page.one("optwatch_step") == 2


def test_board_damaged_while_served(tmp_path: Path) -> None:
    """What cannot be read any more is absent, not repeated; the rank itself is still up."""
    source = feed(tmp_path, 2)
    with agent(tmp_path) as (url, _):
        assert scrape(url).one("optwatch_step") == 2
        os.truncate(source.writer.path, 10)

        def absent() -> None:
            page = scrape(url)
            assert page.all("optwatch_step") == []
            assert page.one("optwatch_boards_skipped_total", reason="truncated") == 1
            assert page.one("optwatch_rank_up") == 1

        eventually(absent)


def test_new_generation_is_followed(tmp_path: Path) -> None:
    """After a restart of the board: new tensors, counters that went on, no values of the old generation."""
    source = feed(tmp_path, 6)
    with agent(tmp_path) as (url, _):
        assert len(scrape(url).all("optwatch_gradient_norm")) == 6
        source.writer.restart(schema(tensors=2))

        def fresh() -> None:
            page = scrape(url)
            assert page.one("optwatch_steps_total") == 6
            assert page.all("optwatch_gradient_norm") == []

        eventually(fresh)
        source.publish()

        def two() -> None:
            assert len(scrape(url).all("optwatch_gradient_norm")) == 2

        eventually(two)


def test_slow_agent_counts_what_it_missed(tmp_path: Path) -> None:
    """Records overwritten before they were read are counted; counters are whole."""
    source = feed(tmp_path, 1)
    with agent(tmp_path, "--interval", "0.5") as (url, _):
        source.publish(1000)

        def counted() -> None:
            page = scrape(url)
            assert page.one("optwatch_steps_total") == 1001
            assert 0 < page.one("optwatch_samples_dropped_total") < 1000

        eventually(counted)


def test_cap_on_series(tmp_path: Path) -> None:
    """No rank gets more than its share; what was left out is counted once, however often it is scraped."""
    feed(tmp_path, 6)
    with agent(tmp_path, "--series", "100") as (url, _):
        first = scrape(url)
        time.sleep(0.2)
        page = scrape(url)
        assert len([s for s in page.samples if "rank" in s.labels]) <= 100
        assert page.one("optwatch_rank_up") == 1
        dropped = page.one("optwatch_series_dropped_total")
        assert dropped > 0
        assert dropped == first.one("optwatch_series_dropped_total")


def test_unknown_and_mislabelled_series_are_left_out(tmp_path: Path) -> None:
    """A board of another release may name metrics that this catalogue has not."""
    gauges = (Series("optwatch.invented"), Series("optwatch.loss", {"wrong": "x"}), Series("optwatch.loss"))
    writer = BoardWriter.create(tmp_path, Schema(run={"run_id": "r", "rank": 0}, gauges=gauges))
    writer.publish(1, 1.0, np.array([1.0, 2.0, 3.0]), [], np.zeros(0))
    with agent(tmp_path) as (url, _):
        page = scrape(url)
        assert page.all("optwatch_loss") == [3.0]
        assert not [s for s in page.samples if "invented" in s.name]


@pytest.mark.parametrize("started", [1e308, -1.0, 1e300, "today", None, True], ids=str)
def test_a_start_that_cannot_be(tmp_path: Path, started: object) -> None:
    """Nor does a histogram that counts less than nothing keep the other values from being pushed."""
    made = replace(schema(), run={**schema().run, "start_time": started})
    writer = BoardWriter.create(tmp_path, made)
    rows = np.ones((12, made.tables[0].width))
    sick = np.full(len(BOUNDS) + 1, np.nan)
    writer.publish(1, 1.0, np.zeros(3), [rows], np.zeros(2), [(sick, 1.0)])
    boards = Boards(tmp_path, 60.0)
    boards.poll()
    found = Collector(boards, NvmlSampler(1.0, 1.0), 300).snapshot()
    data = Translator().data(found, 1e9)
    encoded = encode_metrics(data).SerializeToString()
    boards.close()
    assert b"optwatch.step" in encoded
    assert "optwatch.step_duration" not in found


def test_sick_values_are_shown_and_empty_ones_absent(tmp_path: Path) -> None:
    """NaN and Inf from training are served as they are; 0/0 is no value."""
    tensors = tuple(TensorInfo(g, g, 10) for g in ("sick", "idle", "well"))
    schema_ = Schema(
        run={"run_id": "r", "rank": 0},
        histograms=(HistogramSeries("optwatch.step_duration", {}, BOUNDS),),
        tables=(Table("AdamW", ("m",), (False,), tensors),),
    )
    rows = np.ones((3, schema_.tables[0].width))
    rows[0], rows[1] = np.nan, 0.0
    writer = BoardWriter.create(tmp_path, schema_)
    writer.publish(1, 1.0, np.zeros(0), [rows], np.zeros(0), [(np.zeros(len(BOUNDS) + 1), 0.0)])
    with agent(tmp_path) as (url, _):
        page = scrape(url)
    assert math.isnan(page.one("optwatch_update_quantization_error_ratio", group="sick"))
    assert page.all("optwatch_update_quantization_error_ratio", group="idle") == []
    assert page.one("optwatch_gradient_norm", group="idle") == 0
    assert page.one("optwatch_update_quantization_error_ratio", group="well") == 1


def test_one_agent_per_directory(tmp_path: Path) -> None:
    """A second agent leaves at once, in peace unless it was asked for nonsense; after SIGKILL another takes over."""
    feed(tmp_path, 3)
    command = [sys.executable, "-m", "optwatch.agent", "--dir", str(tmp_path), "--port", "0"]
    with agent(tmp_path) as (url, _):
        second = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=False, env=environment()
        )
        assert second.returncode == 0
        assert "another agent" in second.stderr
        for wrong in (["--otlp-endpoint", "collector"], ["--web-config", "none.yml"], ["--store", __file__]):
            refused = subprocess.run(
                command + wrong, capture_output=True, text=True, timeout=30, check=False, env=environment()
            )
            assert refused.returncode == 1
            assert wrong[1] in refused.stderr
            assert refused.stderr.count("\n") == 1
        assert find_agent(tmp_path) == url
        facts = json.loads((tmp_path / "agent.json").read_text())
        assert set(facts) == {"url", "pid", "started", "version"}
    with agent(tmp_path) as (url, _):  # the first one was killed on leaving the block
        assert scrape(url).one("optwatch_step") == 3
        assert scrape(url).one("optwatch_samples_dropped_total") == 0


def test_a_lock_that_was_removed_is_made_again(tmp_path: Path) -> None:
    """Somebody tidied the directory: the agent is found again at its address, and no second one starts beside it."""
    feed(tmp_path, 3)
    with agent(tmp_path) as (url, _):
        for name in ("agent.lock", "agent.json"):
            (tmp_path / name).unlink()
        eventually(lambda: _found(tmp_path, url))
        done = subprocess.run(
            [sys.executable, "-m", "optwatch.agent", "--dir", str(tmp_path)],
            capture_output=True, text=True, timeout=60, check=False, env=environment(),
        )  # fmt: skip
        assert (done.returncode, done.stderr.count("another agent serves")) == (0, 1)
    log = (tmp_path / "agent-test.log").read_text()
    assert log.count("was removed and has been made again") == 1


def _found(directory: Path, url: str) -> None:
    assert find_agent(directory) == url


def test_an_agent_whose_place_was_taken_leaves(tmp_path: Path) -> None:
    """It takes nothing of the other one's away."""
    feed(tmp_path, 3)
    ours = Election(tmp_path)
    with agent(tmp_path) as (_, process):
        os.kill(process.pid, signal.SIGSTOP)
        (tmp_path / "agent.lock").unlink()
        assert ours.win()
        ours.publish({"url": "http://127.0.0.1:1/metrics"})
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(20) == 0
        assert find_agent(tmp_path) == "http://127.0.0.1:1/metrics"
        ours.resign()
    assert find_agent(tmp_path) is None


def test_a_directory_that_is_gone_is_said_once(tmp_path: Path) -> None:
    """The boards that are open are served on, and the log does not grow."""
    boards = tmp_path / "boards"
    boards.mkdir(0o700)
    source = feed(boards, 3)
    with agent(boards) as (url, _), (boards / "agent-test.log").open() as log:
        shutil.rmtree(boards)
        source.publish(2)
        eventually(lambda: _step(url, 5))
        time.sleep(0.5)  # ten polls
        assert log.read().count("No such file or directory; the boards that are open are served on") == 1
        boards.mkdir(0o700)
        eventually(lambda: _found(boards, url))


def _step(url: str, step: int) -> None:
    assert scrape(url).one("optwatch_step") == step


def test_what_is_no_board_does_not_take_its_place_for_ever(tmp_path: Path) -> None:
    """Noise under the name of a rank: when the rank dies its series end, as any other's do."""
    writer = start_writer(tmp_path)
    path = next(tmp_path.glob("*.board"))
    with agent(tmp_path, "--grace", "0.2") as (url, _):
        eventually(lambda: _up(url, [1]))
        (tmp_path / "noise").write_bytes(b"noise" * 1000)
        (tmp_path / "noise").replace(path)
        eventually(lambda: _counted(url))
        end(writer)
        eventually(lambda: _up(url, []))


def _up(url: str, expected: list[float]) -> None:
    assert scrape(url).all("optwatch_rank_up") == expected


def _counted(url: str) -> None:
    assert sum(scrape(url).all("optwatch_boards_skipped_total")) >= 1


def test_leaves_when_idle(tmp_path: Path) -> None:
    """Without boards for the given time it goes, and takes its address with it."""
    with agent(tmp_path, "--exit-when-idle", "0.3") as (_, process):
        assert process.wait(20) == 0
    assert not (tmp_path / "agent.json").exists()


def test_stays_while_a_rank_lives(tmp_path: Path) -> None:
    """A living board keeps it, whether or not there is news; after the end it stays for the grace period."""
    source = feed(tmp_path, 1)
    with agent(tmp_path, "--exit-when-idle", "0.2", "--grace", "0.5") as (url, process):
        time.sleep(1.0)
        assert scrape(url).one("optwatch_rank_up") == 1
        source.writer.close()
        assert process.wait(20) == 0
    assert not source.writer.path.exists()


def test_directory_of_somebody_else(tmp_path: Path) -> None:
    """The agent refuses what a writer refuses, with one line and exit code 1."""
    tmp_path.chmod(0o777)
    command = [sys.executable, "-m", "optwatch.agent", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=environment())
    assert done.returncode == 1
    assert "can be written by others" in done.stderr
    assert "Traceback" not in done.stderr


def test_loads_no_torch() -> None:
    """Neither torch nor triton, nor what else would make it fat, is loaded by a whole agent."""
    code = (
        "import sys, optwatch.agent.__main__, optwatch.agent, optwatch.exporters.prometheus;"
        "print([m for m in ('torch', 'triton', 'rich', 'click', 'pynvml') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()
    )
    assert done.stdout == "[]\n"
