"""``optwatch top`` and the command line's manners, as a process of its own."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cli.pages import page


@contextmanager
def serving(body: bytes, code: int = 200) -> Iterator[str]:
    """A real HTTP server on the loopback address that answers everything with ``body``."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def optwatch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "optwatch", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_top_shows_a_running_agent() -> None:
    """The path may be left out; the output of one look is the view."""
    with serving(page().encode()) as url:
        result = optwatch("top", url, "--once")
    assert result.returncode == 0, result.stderr
    assert "5.00 steps/s" in result.stdout
    assert f"{url}/metrics" in result.stdout


def test_top_stops_when_its_reader_is_gone() -> None:
    """`optwatch top | head -1` ends, without a traceback."""
    with serving(page().encode()) as url:
        command = f"{sys.executable} -m optwatch top {url} --interval 0.1 | head -n 1"
        result = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60
        )
    assert result.stdout.startswith("step 100")
    assert result.stderr == ""


def test_the_version() -> None:
    """`optwatch --version` is the package's."""
    import optwatch as package

    assert optwatch("--version").stdout == f"optwatch, version {package.__version__}\n"


def test_help_lists_the_commands() -> None:
    """Without a command the help is shown."""
    result = optwatch()
    assert result.returncode == 0
    for command in ("agent", "demo", "top"):
        assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["top", "--colour"], 2, "No such option"),
        (["top", "--interval", "never", "localhost"], 2, "'never' is not a valid float"),
        (["top", "ftp://localhost/metrics"], 1, "'ftp://localhost/metrics' is no address of an agent"),
        (["top", "localhost:99999999"], 1, "'localhost:99999999' is no address of an agent"),
        (["top", "http://[::1"], 1, "'http://[::1' is no address of an agent"),
        (["top", "a" * 300], 1, "is no address of an agent"),
        (["top", "höst"], 1, "'höst' is no address of an agent"),
        (["top", "http://127.0.0.1:1/ x"], 1, "does not answer"),
        (["top", "--interval", "nan", "localhost"], 2, "nan is not a number of seconds"),
        (["top", "--interval", "inf", "localhost"], 2, "inf is not in the range"),
        (["top", "one", "two"], 2, "unexpected extra argument"),
        (["demo", "--seconds", "nan"], 2, "nan is not a number of seconds"),
        (["top", "127.0.0.1:1"], 1, "http://127.0.0.1:1/metrics does not answer: connection refused"),
        (["demo", "--steps", "0"], 2, "0 is not in the range"),
        (["demo", "--inject", "chaos"], 2, "'chaos' is not"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], code: int, message: str) -> None:
    """What was given, what is wrong; no traceback; an exit code that is not zero."""
    result = optwatch(*arguments)
    assert result.returncode == code
    assert message in result.stderr
    assert result.stderr.startswith("optwatch: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b"<html></html>", 200, "is not a metrics page"),
        (b"up 1\n", 200, "not of an optwatch agent"),
        (b"no", 404, "answered 404"),
    ],
)
def test_other_servers_are_refused(body: bytes, code: int, message: str) -> None:
    """A server that is no agent."""
    with serving(body, code) as url:
        result = optwatch("top", url)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_top_without_an_agent(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs here: the line says what to do."""
    monkeypatch.setenv("OPTWATCH_DIR", str(tmp_path))
    result = optwatch("top")
    assert result.returncode == 1
    assert "no agent is running here: start a run" in result.stderr
