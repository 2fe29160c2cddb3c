"""The ways to run an agent: once, to a file, found by Prometheus, pushing, under a scheduler."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_process import Scrape, agent, eventually, get, scrape
from board_samples import Feed, environment, schema
from optwatch.board import BoardWriter
from otlp_receivers import RECEIVERS
from prometheus_server import PrometheusServer


def feed(directory: Path, run_id: str = "run", steps: int = 6) -> Feed:
    """A board in this process."""
    made = Feed(BoardWriter.create(directory, schema(run_id)))
    made.publish(steps)
    return made


def command(directory: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the agent to its end."""
    return subprocess.run(
        [sys.executable, "-m", "optwatch.agent", "--dir", str(directory), *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**environment(), **variables},
    )


def sibling(url: str, path: str) -> str:
    return url.replace("/metrics", path)


def test_once_prints_a_scrape_and_touches_nothing(tmp_path: Path) -> None:
    """The same series as an agent serves beside it; boards, even dead ones, stay."""
    feed(tmp_path)
    (tmp_path / "broken-0.board").write_bytes(b"noise")
    with agent(tmp_path) as (url, _):
        before = sorted(path.name for path in tmp_path.iterdir())
        done = command(tmp_path, "--once", "--grace", "0")
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        served = scrape(url)
    assert done.returncode == 0, done.stderr
    moving = {"optwatch_scrape_duration_seconds", "optwatch_host_memory_rss_bytes"}
    moving.add("optwatch_store_failures_total")  # --once keeps no history

    def named(page: Scrape) -> dict:
        return {(s.name, tuple(s.labels.items())): s.value for s in page.samples if s.name not in moving}

    assert named(Scrape(done.stdout)) == named(served)


def test_textfile(tmp_path: Path) -> None:
    """Written whole, readable by node_exporter, renewed, and taken away at the end."""
    boards = tmp_path / "boards"
    source = feed_in(boards)
    path = tmp_path / "optwatch.prom"
    with agent(boards, "--textfile", str(path)) as (_, process):
        eventually(lambda: _step(path, 6))
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        source.publish()
        eventually(lambda: _step(path, 7))
        assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".prom")] == ["optwatch.prom"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert not path.exists()
    done = command(boards, "--once", "--textfile", str(path))
    assert (done.returncode, done.stdout) == (0, "")
    _step(path, 7)


def feed_in(directory: Path) -> Feed:
    directory.mkdir(mode=0o700)
    return feed(directory)


def _step(path: Path, step: int) -> None:
    assert path.exists()
    assert Scrape(path.read_text()).all("optwatch_step") == [step]


def test_files_for_discovery(tmp_path: Path) -> None:
    """One for each run, the same as http_sd; a run's file goes with the run, all go with the agent."""
    boards, found = tmp_path / "boards", tmp_path / "targets"
    found.mkdir()
    source = feed_in(boards)
    options = ("--file-sd", str(found), "--grace", "0.3", "--advertise", "node1")
    with agent(boards, *options) as (url, process):
        second = feed(boards, "other")
        eventually(lambda: _files(found, 2))
        groups = [group for path in sorted(found.iterdir()) for group in json.loads(path.read_text())]
        kind, body = get(sibling(url, "/sd"))
        assert kind == "application/json"
        assert json.loads(body) == sorted(groups, key=lambda g: g["labels"]["__meta_optwatch_run_id"])
        port = url.rsplit(":", 1)[1].partition("/")[0]
        assert {target for group in groups for target in group["targets"]} == {f"node1:{port}"}
        assert {group["labels"]["__meta_optwatch_run_id"] for group in groups} == {"run", "other"}
        second.writer.close()
        eventually(lambda: _files(found, 1))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert list(found.iterdir()) == []
    assert source.publish()


def _files(directory: Path, count: int) -> None:
    assert len(list(directory.glob("*.json"))) == count


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["file_sd_configs", "http_sd_configs"])
def test_prometheus_finds_two_runs_as_one_target(tmp_path: Path, kind: str) -> None:
    """No series comes twice though each run has a group of its own, and its labels can be relabelled by."""
    boards, found = tmp_path / "boards", tmp_path / "targets"
    found.mkdir()
    feed_in(boards)
    feed(boards, "other")
    with agent(boards, "--file-sd", str(found)) as (url, _):
        where = {"files": [f"{found}/*.json"]} if kind[0] == "f" else {"url": sibling(url, "/sd")}
        where["refresh_interval"] = "1s"
        with PrometheusServer(
            tmp_path / "prometheus", url, scrape={"static_configs": [], kind: [where]}
        ) as server:
            server.wait_for("optwatch_step")
            assert len(server.query("optwatch_step")) == 2
            (target,) = server.targets()
            assert target["health"] == "up"
            assert target["discoveredLabels"]["__meta_optwatch_run_id"] in {"run", "other"}


@pytest.mark.parametrize("protocol", RECEIVERS)
def test_pushed_is_what_is_scraped(tmp_path: Path, protocol: str) -> None:
    """Every series of a scrape arrives at the collector, under the catalogue's names; the last one at SIGTERM."""
    source = feed(tmp_path)
    with RECEIVERS[protocol]() as received:
        options = ("--otlp-endpoint", received.url, "--otlp-protocol", protocol, "--otlp-interval", "0.1")
        with agent(tmp_path, *options) as (url, process):
            received.wait_for(2)
            page = scrape(url)
            assert page.one("optwatch_otlp_exports_total") >= 1
            assert page.one("optwatch_otlp_failures_total", reason="refused") == 0
            source.publish()
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        pushed = [
            metric
            for resource in received.requests[-1].resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        ]
    points = {metric.name: len(getattr(metric, metric.WhichOneof("data")).data_points) for metric in pushed}
    scraped = [s for s in page.samples if not s.name.endswith(("_bucket", "_sum"))]
    assert sum(points.values()) == len(scraped)
    (steps,) = next(m for m in pushed if m.name == "optwatch.steps").sum.data_points
    assert steps.as_double >= 6


def test_a_collector_that_is_not_there(tmp_path: Path) -> None:
    """Served as ever, counted, said once; the end takes seconds, not the collector's time."""
    feed(tmp_path)
    options = ("--otlp-endpoint", "http://127.0.0.1:9", "--otlp-interval", "0.1")
    with agent(tmp_path, *options, environment={"OTEL_EXPORTER_OTLP_TIMEOUT": "1"}) as (url, process):

        def counted() -> None:
            page = scrape(url)
            assert page.one("optwatch_step") == 6
            assert page.one("optwatch_otlp_failures_total", reason="refused") >= 2

        eventually(counted)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    log = (tmp_path / "agent-test.log").read_text()
    assert log.count("does not take metrics") == 1


def test_otlp_is_not_loaded_unasked(tmp_path: Path) -> None:
    """Neither the SDK nor gRPC is in the memory of an agent that does not push."""
    feed(tmp_path)
    code = (
        "import sys; from optwatch.agent.__main__ import main; "
        f"main(['--once', '--dir', {str(tmp_path)!r}, '--textfile', {str(tmp_path / 'x.prom')!r}]);"
        "print([m for m in ('opentelemetry', 'grpc', 'bcrypt', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()
    )
    assert done.stdout == "[]\n"


def test_variables_for_others_do_not_keep_it_from_serving(tmp_path: Path) -> None:
    """An endpoint in the environment that makes no sense is said, and nothing is pushed."""
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "collector", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    with agent(tmp_path, environment=variables) as (url, _):
        assert scrape(url).all("optwatch_otlp_exports_total") == []
    assert "nothing is pushed over OTLP: " in (tmp_path / "agent-test.log").read_text()


def test_structured_log(tmp_path: Path) -> None:
    """Every line is a JSON object with time, level and message."""
    (tmp_path / "broken-0.board").write_bytes(b"noise")
    with agent(tmp_path, "--log-format", "json"):
        pass
    lines = [json.loads(line) for line in (tmp_path / "agent-test.log").read_text().splitlines()]
    assert any("broken-0.board skipped" in line["message"] for line in lines)
    assert all({"time", "level", "logger", "message"} == set(line) for line in lines)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--port", "70000"], "--port '70000': expected a number of 0 to 65535"),
        (["--port", "-1"], "--port '-1': expected"),
        (["--port", "9464.5"], "--port '9464.5': expected"),
        (["--port"], "--port: expected one argument"),
        (["--interval", "0"], "--interval '0': expected a number of seconds, 0.01 to 3e+08"),
        (["--interval", "1e-9"], "--interval '1e-9': expected"),
        (["--interval", "1e300"], "--interval '1e300': expected"),
        (["--interval", "nan"], "--interval 'nan': expected"),
        (["--device-limit", "inf"], "--device-limit 'inf': expected"),
        (["--grace", "-1"], "--grace '-1': expected a number of seconds, 0 or"),
        (["--exit-when-idle", "soon"], "--exit-when-idle 'soon': expected"),
        (["--series", "none"], "--series 'none': expected a whole number"),
        (["--series", "0"], "--series '0': expected"),
        (["--series", "9" * 5000], "expected a whole number of 1 to 1000000"),
        (["--nice", "-20"], "--nice '-20': expected a whole number of 0 to 19"),
        (["--host", ""], "--host '': expected a host name"),
        (["--host", "http://localhost"], "--host 'http://localhost': expected a host name"),
        (["--advertise", "node 1"], "--advertise 'node 1': expected a host name"),
        (["--advertise", "node1/\x00"], "expected a host name"),
        (["--dir", ""], "--dir '': expected some text"),
        (["--store", " "], "--store ' ': expected some text"),
        (["--otlp-protocol", "udp"], "--otlp-protocol 'udp': expected one of grpc, http/protobuf"),
        (["--textfile", "metrics.txt"], "expected a name that ends in .prom"),
        (["--log-format", "xml"], "--log-format 'xml': expected one of text, json"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--dev", "1"], "unrecognized arguments: --dev 1"),
        (["more"], "unrecognized arguments: more"),
    ],
    ids=str,
)
def test_senseless_options(tmp_path: Path, options: list[str], complaint: str, capsys) -> None:
    """Code 2 and one line that says who complains, of what, and what was expected."""
    from optwatch.agent.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main(["--dir", str(tmp_path), *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("optwatch agent: ")
    assert complaint in error
    assert error.count("\n") == 1


@pytest.fixture
def restored() -> Iterator[None]:
    """Nothing of an agent that was run in this process stays."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    """A full disk is code 1 and one line; a reader that leaves is nobody's mistake."""
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "optwatch.agent", "--dir", str(tmp_path), "--once"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False, env=environment(),
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "optwatch agent: No space left on device\n")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--textfile", "/nowhere/x.prom"], "/nowhere/x.prom"),
        (["--textfile", "/dev/null/x.prom"], "/dev/null/x.prom: Not a directory"),
        (["--file-sd", "/nowhere"], "/nowhere: No such file or directory"),
        (["--file-sd", "/dev/null"], "/dev/null: Not a directory"),
        (["--store", "/dev/null"], "/dev/null: is not a directory"),
        (["--store", "/dev/null/store"], "/dev/null/store: Not a directory"),
        (["--dir", "/dev/null"], "/dev/null: is not a directory"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--host", "8.8.8.8"], "8.8.8.8"),
        (["--host", "a" * 300], "aaa"),
        (["--host", "ü" * 100], "is no host name"),
        (["--web-config", "/nowhere.yml"], "/nowhere.yml: cannot be read"),
        (["--web-config", "/dev"], "/dev: cannot be read"),
        (["--otlp-endpoint", "collector:4318"], "expected something like http://collector:4318"),
        (["--web-config", "broken.yml"], "broken.yml: is not YAML"),
        (["--otlp-endpoint", "http://[::1"], "expected something like http://collector:4318"),
        (["--otlp-endpoint", "http://collector:99999"], "expected something like http://collector:4318"),
        (["--once", "--textfile", "/nowhere/x.prom"], "/nowhere/x.prom"),
    ],
    ids=str,
)
def test_what_cannot_be_had(
    tmp_path: Path, options: list[str], complaint: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, restored: None,
) -> None:  # fmt: skip
    """Code 1, one line without a traceback, and no agent left behind."""
    from optwatch.agent.__main__ import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yml").write_text("basic_auth_users: [a\n")
    assert main(["--dir", str(tmp_path), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("optwatch agent: ")
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "agent.json").exists()
