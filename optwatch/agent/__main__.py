"""``python -m optwatch.agent``: run the agent in the foreground."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# numpy's linear algebra would start a thread, with its own memory, per core; the agent adds short columns.
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from optwatch.agent import logs  # noqa: E402 - the environment comes first
from optwatch.agent.service import serve, snapshot_once  # noqa: E402
from optwatch.agent.settings import Settings  # noqa: E402
from optwatch.agent.webconfig import WebConfigError  # noqa: E402
from optwatch.board import BoardDirectoryError  # noqa: E402
from optwatch.board.replace import replace_file  # noqa: E402
from optwatch.exporters.otlp import PROTOCOLS, OtlpError  # noqa: E402

#: Seconds: less is no pause, more is no number that a wait takes (ten years).
_SHORTEST, _LONGEST = 0.01, 3e8


def _seconds(text: str) -> float:
    value = float(text)
    if not _SHORTEST <= value <= _LONGEST:
        raise ValueError
    return value


def _grace(text: str) -> float:
    return 0.0 if float(text) == 0 else _seconds(text)


def _whole(text: str, least: int, most: int) -> int:
    value = int(text)
    if not least <= value <= most:
        raise ValueError
    return value


def _port(text: str) -> int:
    return _whole(text, 0, 65535)


def _series(text: str) -> int:
    return _whole(text, 1, 1_000_000)


def _nice(text: str) -> int:
    return _whole(text, 0, 19)


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError
    return text


def _host(text: str) -> str:
    if not text or any(one.isspace() or one in "/@?#[]" for one in text):
        raise ValueError
    return text


def _protocol(text: str) -> str:
    if text not in (*PROTOCOLS, "http"):
        raise ValueError
    return text


def _format(text: str) -> str:
    if text not in logs.FORMATS:
        raise ValueError
    return text


_Kind = Callable[[str], Any]
#: What a value is read with, and what to expect of it.
_KINDS: dict[_Kind, str] = {
    _text: "some text",
    _host: "a host name or an address, without port or scheme",
    _seconds: f"a number of seconds, {_SHORTEST:g} to {_LONGEST:g}",
    _grace: f"a number of seconds, 0 or {_SHORTEST:g} to {_LONGEST:g}",
    _port: "a number of 0 to 65535; 0 takes any free port",
    _series: "a whole number of 1 to 1000000",
    _nice: "a whole number of 0 to 19",
    _protocol: f"one of {', '.join(PROTOCOLS)}",
    _format: f"one of {', '.join(logs.FORMATS)}",
}
_OPTIONS: dict[str, tuple[_Kind, str]] = {
    "host": (_host, "address to bind to"),
    "port": (_port, "first port to try; the next ones and then any free one follow"),
    "advertise": (_host, "host under which Prometheus is to reach it"),
    "web_config": (_text, "web-config.yml of Prometheus' exporter-toolkit: TLS, mutual TLS, passwords"),
    "interval": (_seconds, "seconds between polls of the boards"),
    "grace": (_grace, "seconds to serve the last values of a rank that ended"),
    "series": (_series, "series of one rank at most"),
    "device_interval": (_seconds, "seconds between samples of the GPUs"),
    "device_limit": (_seconds, "seconds until a call of the GPU driver counts as hung"),
    "exit_when_idle": (_grace, "leave after so many seconds without boards"),
    "textfile": (_text, "also write this .prom file, for node_exporter's textfile collector"),
    "file_sd": (_text, "write a file for each run to this directory, for Prometheus' file_sd"),
    "otlp_endpoint": (_text, "push to this collector, e.g. http://collector:4318"),
    "otlp_protocol": (_protocol, f"one of {', '.join(PROTOCOLS)}"),
    "otlp_interval": (_seconds, "seconds between pushes"),
    "store": (_text, "keep the history of runs in this directory; off: in memory, while a run is served"),
}
#: What is no setting of the agent, but of its process.
_OWN: dict[str, tuple[_Kind, str]] = {
    "dir": (_text, "directory of the boards (default: the user's own in shared memory)"),
    "nice": (_nice, "be this much nicer to other processes"),
    "log_format": (_format, f"one of {', '.join(logs.FORMATS)} (default: text)"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> _Parser:
    parser = _Parser("optwatch agent", description="Serve the boards of this node.", allow_abbrev=False)
    parser.add_argument(
        "--once", action="store_true", help="print (or --textfile) the metrics once and leave"
    )
    for name, (_, text) in {**_OWN, **_OPTIONS}.items():
        default = getattr(Settings, name, None)
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(_option(name), help=text + shown)
    return parser


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _values(parser: _Parser, options: argparse.Namespace) -> dict[str, Any]:
    """The values that were given. One that makes no sense ends the program with code 2 and one line."""
    found = {}
    for name, (kind, _) in {**_OWN, **_OPTIONS}.items():
        given = getattr(options, name)
        if given is None:
            continue
        try:
            found[name] = kind(given)
        except ValueError:
            parser.error(f"{_option(name)} {given!r}: expected {_KINDS[kind]}")
    textfile = found.get("textfile")
    if textfile is not None and not textfile.endswith(".prom"):
        parser.error(f"--textfile {textfile!r}: expected a name that ends in .prom; others are not collected")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and serve. Exit code 1: something that was asked for cannot be had, in one line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    values = _values(parser, options)
    directory, nice = values.pop("dir", None), values.pop("nice", 0)
    logs.set_up(values.pop("log_format", "text"))
    settings = Settings(**values)
    with contextlib.suppress(OSError):
        os.nice(nice)
    try:
        # A scheduler's SIGTERM is a clean end: the address, the files and the last push are seen to.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        if options.once:
            _once(directory, settings)
        else:
            serve(directory, settings)
    except BrokenPipeError:  # `optwatch agent --once | head`
        sys.stderr.close()
    except (BoardDirectoryError, OSError, OtlpError, WebConfigError) as error:
        sys.stderr.write(f"{parser.prog}: {_words(error)}\n")
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def _words(error: Exception) -> str:
    """What went wrong, on one line; of an OSError without its number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def _once(directory: str | None, settings: Settings) -> None:
    text = snapshot_once(directory, settings)
    if settings.textfile is None:
        left = memoryview(text)
        while left:  # not through a buffer, which would be written again at exit when the first time failed
            left = left[os.write(sys.stdout.fileno(), left) :]
    else:
        replace_file(Path.cwd() / settings.textfile, text, 0o644)


if __name__ == "__main__":
    sys.exit(main())
