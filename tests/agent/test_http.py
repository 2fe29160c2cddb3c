"""The agent's address: what it answers, and what a client cannot do to it."""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import sys
import threading
import time
import urllib.error
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from agent_process import agent, eventually, get
from board_samples import Feed, schema
from optwatch.agent import server
from optwatch.agent.boards import Boards
from optwatch.agent.election import Election
from optwatch.agent.history import HistoryPages
from optwatch.agent.service import Agent
from optwatch.agent.settings import Settings
from optwatch.board import BoardWriter
from optwatch.exporters.base import Point
from optwatch.exporters.store import LocalStore

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """An agent with one board, for all tests of this file."""
    directory = tmp_path_factory.mktemp("boards")
    Feed(BoardWriter.create(directory, schema())).publish(6)
    with agent(directory) as (url, _):
        eventually(lambda: has_history(url))
        yield url


def has_history(url: str) -> None:
    assert json.loads(get(url.replace("/metrics", "/api/runs"))[1])["runs"] == ["run"]


def talk(url: str, request: bytes) -> bytes:
    """Send raw bytes, return all that comes back."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def test_both_formats_parse_and_agree(address: str) -> None:
    """Text by default, OpenMetrics when asked for; the same series and values by the official parsers."""
    kind, text = get(address)
    assert kind.startswith("text/plain")
    open_kind, open_text = get(address, OPENMETRICS)
    assert open_kind.startswith("application/openmetrics-text")
    skipped = {"optwatch_scrape_duration_seconds", "optwatch_host_memory_rss_bytes"}  # these move

    def samples(families) -> dict:
        return {
            (s.name, tuple(sorted(s.labels.items()))): s.value
            for family in families
            for s in family.samples
            if s.name not in skipped and not s.name.endswith("_created")
        }

    first, second = samples(parse_text(text.decode())), samples(parse_openmetrics(open_text.decode()))
    assert len(first) > 100
    assert first == second


def test_concurrent_scrapers_get_the_same_bytes(tmp_path: Path) -> None:
    """One rendering per refresh, whoever asks."""
    Feed(BoardWriter.create(tmp_path, schema())).publish(6)
    with agent(tmp_path, "--interval", "60") as (url, _):
        bodies: list[bytes] = []
        threads = [threading.Thread(target=lambda: bodies.append(get(url)[1])) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(bodies) == 8
    assert len(set(bodies)) == 1


def test_a_scrape_does_not_wait_for_the_boards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a poll hangs, scrapers get what the last one found; when that is long ago, 503 and no old values."""
    feed = Feed(BoardWriter.create(tmp_path, schema()))
    feed.publish(3)
    hang_now, hangs, go_on = threading.Event(), threading.Event(), threading.Event()
    poll = Boards.poll

    def hang(boards: Boards) -> None:
        if hang_now.is_set():
            hangs.set()
            go_on.wait()
        poll(boards)

    monkeypatch.setattr(Boards, "poll", hang)
    election = Election(tmp_path)
    assert election.win()
    served = Agent(tmp_path, Settings(port=0, interval=0.01, store="off"))
    url = served.start(election)
    thread = threading.Thread(target=served.run)
    thread.start()
    try:
        assert b"optwatch_step{" in get(url)[1]
        hang_now.set()
        assert hangs.wait(20)
        assert b"optwatch_step{" in get(url)[1]
        passed = time.monotonic() + 60
        monkeypatch.setattr("optwatch.agent.service.time.monotonic", lambda: passed)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            get(url)
    finally:
        monkeypatch.undo()
        go_on.set()
        served.stop()
        thread.join()
        election.resign()
        served.close()


def test_health_and_readiness(address: str) -> None:
    """Both pages answer; readiness counts the ranks."""
    assert get(address.replace("/metrics", "/healthz"))[1] == b"ok\n"
    facts = json.loads(get(address.replace("/metrics", "/readyz"))[1])
    assert (facts["ranks"], facts["living"]) == (1, 1)


def test_nothing_secret_is_served(tmp_path: Path) -> None:
    """No page and no header tells a path, an argument, the environment or what the agent is made of."""
    Feed(BoardWriter.create(tmp_path, schema())).publish(6)
    secrets = {
        "OPTWATCH_TEST_TOKEN": "of-the-environment",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-key=of-the-collector",
    }
    pages = [
        "",
        "metrics",
        "healthz",
        "readyz",
        "sd",
        "tensors",
        "api/runs",
        "api/history?run=run",
        "missing",
    ]
    options = ("--otlp-endpoint", "http://me:of-the-address@127.0.0.1:9", "--otlp-interval", "0.05")
    with agent(tmp_path, *options, environment=secrets) as (url, process):
        eventually(lambda: has_history(url))
        root = url.removesuffix("metrics")
        served = b"".join(talk(root, f"GET /{page} HTTP/1.1\r\n\r\n".encode()) for page in pages)
        words = [
            "of-the-environment",
            "of-the-collector",
            "of-the-address",
            str(tmp_path),
            sys.prefix,
            "Python/",
        ]
        assert [word for word in words if word.encode() in served] == []
        assert str(process.pid).encode() not in get(f"{root}readyz")[1]
        eventually(lambda: said(tmp_path, "does not take metrics"))
    assert "of-the-" not in (tmp_path / "agent-test.log").read_text()


def said(directory: Path, words: str) -> None:
    assert words in (directory / "agent-test.log").read_text()


@pytest.mark.parametrize("path", ["/api/", "/metrics/", "/../etc/passwd", "/api", "/%6detrics"])
def test_unknown_path(address: str, path: str) -> None:
    """Nothing but the three pages is served."""
    answer = talk(address, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert re.match(rb"HTTP/1\.[01] 404 ", answer)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW"])
def test_other_methods(address: str, method: str) -> None:
    """405 with what is allowed; a body is not read."""
    answer = talk(address, f"{method} /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc".encode())
    assert re.match(rb"HTTP/1\.[01] 405 ", answer)
    assert b"\r\nAllow: GET\r\n" in answer


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"X: " + b"b" * 100_000 + b"\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"\x00" * 50_000,
        b"\xff\xfe\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\n\r\n",
        b"",
    ],
    ids=["long-url", "long-header", "many-headers", "zeros", "noise", "version", "nothing"],
)
def test_hostile_requests(address: str, request_bytes: bytes) -> None:
    """Refused or dropped, in bounded memory; the next scrape is served."""
    try:
        answer = talk(address, request_bytes)
    except OSError:  # refused while we were still sending
        answer = b""
    assert b" 200 " not in answer[:20]
    assert b"optwatch_rank_up" in get(address)[1]


@pytest.mark.parametrize(
    ("question", "status"),
    [
        ("/api/history", 404),
        ("/api/history?run=another", 404),
        ("/api/history?run=run&since=never", 400),
        ("/api/history?run=run&since=nan", 400),
        ("/api/history?run=run&since=1e999", 400),
        ("/api/history?run=run&since=-1", 400),
        ("/api/history?run=run&since=1e300", 400),
        ("/api/history?run=run&since=" + "9" * 400, 400),
        ("/api/history?run=../../etc/passwd", 404),
        ("/api/history?run=%ff%00", 404),
        ("/api/history?run=run&since=99999999999", 200),
        ("/api/history?run=run&run=another", 404),
        ("/api/history?" + "&" * 5000, 404),
        ("/tensors?k=%00", 400),
        ("/tensors?rank=9&rank=%f0%9f%99%82", 200),
        ("/metrics?name[]=x", 200),
        ("/sd?x", 200),
        ("/readyz?%", 200),
    ],
    ids=lambda value: str(value)[:50],
)
def test_senseless_questions(address: str, question: str, status: int) -> None:
    """A status that says whose mistake it was and, where it was the client's, one short line."""
    head, _, body = talk(address, f"GET {question} HTTP/1.1\r\n\r\n".encode()).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert status == 200 or (body.count(b"\n") == 1 and len(body) < 200)


def test_the_history_of_many_series_is_bounded(tmp_path: Path) -> None:
    """Thousands of curves share the points that one answer has; each keeps its extremes."""
    now = 1e9
    store = LocalStore(tmp_path, clock=lambda: now)
    labels = [{"run_id": "run", "rank": str(rank)} for rank in range(1000)]
    run = {"optwatch.run": [Point(labels[0], 1.0)], "optwatch.rank_up": [Point(one, 1.0) for one in labels]}
    for second in range(100):
        now += 1
        store.accept(run | {"optwatch.loss": [Point(one, 5.0 if second == 77 else 1.0) for one in labels]})
    answer = HistoryPages(store).pages["/api/history"](server.Request("", {"run": "run"}))
    store.close()
    found = json.loads(answer.body)["curves"]
    assert len(found) == 2000
    assert sum(len(curve["time"]) for curve in found) <= 120_000
    assert all(max(c["high"]) == 5.0 for c in found if c["metric"] == "optwatch.loss")


def test_a_page_that_fails_is_500() -> None:
    """Not a connection that ends without a word; the agent's log has the reason."""

    def broken(_: server.Request) -> server.Response:
        return server.Response.json(math.nan)

    one = server.Server("127.0.0.1", 0, {"/": broken})
    one.start()
    try:
        with pytest.raises(urllib.error.HTTPError, match="500"):
            get(f"http://127.0.0.1:{one.port}/")
    finally:
        one.stop()


def test_slow_clients_are_dropped_and_block_nobody(address: str) -> None:
    """Clients that send a byte now and then, or nothing, lose their connection; others are served meanwhile."""
    parts = urlsplit(address)
    slow = [socket.create_connection((parts.hostname, parts.port)) for _ in range(8)]
    slow[0].sendall(b"GET /met")
    assert b"optwatch_rank_up" in get(address)[1]
    for connection in slow:
        connection.settimeout(3 * server._REQUEST_SECONDS)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1000) == b""
        connection.close()


def test_a_byte_at_a_time_gains_nothing(address: str) -> None:
    """The time limit is for the whole request, not for each byte."""
    parts = urlsplit(address)
    connection = socket.create_connection((parts.hostname, parts.port))
    end = time.monotonic() + 3 * server._REQUEST_SECONDS

    def drip() -> None:
        while time.monotonic() < end:
            connection.sendall(b"X")
            time.sleep(0.2)

    with pytest.raises(OSError):  # noqa: PT011 - reset or broken pipe, as the system likes
        drip()
    connection.close()


def test_too_many_connections(address: str) -> None:
    """Beyond the limit connections are closed at once; when others end, scrapes work again."""
    parts = urlsplit(address)
    many = [socket.create_connection((parts.hostname, parts.port)) for _ in range(server._CONNECTIONS + 8)]
    many[-1].settimeout(10)
    with contextlib.suppress(ConnectionResetError):
        assert many[-1].recv(10) == b""
    for connection in many:
        connection.close()

    def served() -> None:
        try:
            assert b"optwatch_rank_up" in get(address)[1]
        except (urllib.error.URLError, ConnectionError) as error:
            raise AssertionError from error

    eventually(served)


def test_port_taken(tmp_path: Path) -> None:
    """The next free port is taken, published, and said once."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with agent(tmp_path, "--port", str(port)) as (url, _):
            assert urlsplit(url).port != port
            assert b"optwatch_build_info" in get(url)[1]
    log = (tmp_path / "agent-test.log").read_text()
    assert log.count(f"port {port} of 127.0.0.1 is taken") == 1


def test_every_port_taken_ends_with_any_free_one() -> None:
    """When the next ones are taken too, the system chooses."""
    with contextlib.ExitStack() as held:
        taken: list[int] = []
        with contextlib.suppress(OSError):  # somebody else has one of the next ports: taken is taken
            while len(taken) < server._NEXT_PORTS:
                one = held.enter_context(socket.socket())
                one.bind(("127.0.0.1", taken[0] + len(taken) if taken else 0))
                one.listen()
                taken.append(one.getsockname()[1])
        with server.Server.on_free_port("127.0.0.1", taken[0], {}) as found:
            assert found.port not in taken


def test_bound_to_loopback(address: str) -> None:
    """Unless told otherwise, nobody outside the machine can ask."""
    assert urlsplit(address).hostname == "127.0.0.1"
    port = urlsplit(address).port
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ours = [row[1] for row in listening if row[3] == "0A" and int(row[1].split(":")[1], 16) == port]
    assert ours == [f"0100007F:{port:04X}"]
