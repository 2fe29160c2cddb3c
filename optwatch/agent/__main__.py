"""``python -m optwatch.agent``: run the agent in the foreground."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0 or math.isinf(value):
        raise ValueError
    return value


def _grace(text: str) -> float:
    return 0.0 if float(text) == 0 else _seconds(text)


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise ValueError
    return value


def _series(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _protocol(text: str) -> str:
    if text not in (*PROTOCOLS, "http"):
        raise ValueError
    return text


_Kind = Callable[[str], Any]
#: What a value is read with, and what to expect of it.
_KINDS: dict[_Kind, str] = {
    str: "text",
    _seconds: "a positive number of seconds",
    _grace: "a number of seconds, 0 or more",
    _port: "a number of 0 to 65535; 0 takes any free port",
    _series: "a whole number of at least 1",
    _protocol: f"one of {', '.join(PROTOCOLS)}",
}
_OPTIONS: dict[str, tuple[_Kind, str]] = {
    "host": (str, "address to bind to"),
    "port": (_port, "first port to try; the next ones and then any free one follow"),
    "advertise": (str, "host under which Prometheus is to reach it"),
    "web_config": (str, "web-config.yml of Prometheus' exporter-toolkit: TLS, mutual TLS, passwords"),
    "interval": (_seconds, "seconds between polls of the boards"),
    "grace": (_grace, "seconds to serve the last values of a rank that ended"),
    "series": (_series, "series of one rank at most"),
    "device_interval": (_seconds, "seconds between samples of the GPUs"),
    "device_limit": (_seconds, "seconds until a call of the GPU driver counts as hung"),
    "exit_when_idle": (_grace, "leave after so many seconds without boards"),
    "textfile": (str, "also write this .prom file, for node_exporter's textfile collector"),
    "file_sd": (str, "write a file for each run to this directory, for Prometheus' file_sd"),
    "otlp_endpoint": (str, "push to this collector, e.g. http://collector:4318"),
    "otlp_protocol": (_protocol, f"one of {', '.join(PROTOCOLS)}"),
    "otlp_interval": (_seconds, "seconds between pushes"),
    "store": (str, "keep the history of runs in this directory; off: in memory, while a run is served"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m optwatch.agent", description="Serve the boards of this node.")
    parser.add_argument("--dir", help="directory of the boards (default: the user's own in shared memory)")
    parser.add_argument("--nice", type=int, default=0, help="be this much nicer to other processes")
    parser.add_argument("--log-format", choices=logs.FORMATS, default="text", help="default: %(default)s")
    parser.add_argument(
        "--once", action="store_true", help="print (or --textfile) the metrics once and leave"
    )
    for name, (_, text) in _OPTIONS.items():
        default = getattr(Settings, name)
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument("--" + name.replace("_", "-"), help=text + shown)
    return parser


def _settings(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Settings:
    """The settings of the command line. A value that makes no sense ends the program with code 2 and one line."""
    found = {}
    for name, (kind, _) in _OPTIONS.items():
        given = getattr(options, name)
        if given is None:
            continue
        try:
            found[name] = kind(given)
        except ValueError:
            parser.error(f"--{name.replace('_', '-')} {given}: expected {_KINDS[kind]}")
    settings = Settings(**found)
    if settings.textfile is not None and not settings.textfile.endswith(".prom"):
        parser.error(
            f"--textfile {settings.textfile}: expected a name that ends in .prom; others are not collected"
        )
    return settings


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and serve. Exit code 1: something that was asked for cannot be had, in one line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    settings = _settings(parser, options)
    logs.set_up(options.log_format)
    if options.nice:
        with contextlib.suppress(OSError):
            os.nice(options.nice)
    try:
        # A scheduler's SIGTERM is a clean end: the address, the files and the last push are seen to.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        if options.once:
            _once(options.dir, settings)
        else:
            serve(options.dir, settings)
    except (BoardDirectoryError, OSError, OtlpError, WebConfigError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def _once(directory: str | None, settings: Settings) -> None:
    text = snapshot_once(directory, settings)
    if settings.textfile is None:
        sys.stdout.buffer.write(text)
    else:
        replace_file(Path.cwd() / settings.textfile, text, 0o644)


if __name__ == "__main__":
    sys.exit(main())
