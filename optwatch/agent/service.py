"""The agent: polls the boards, samples the node, serves what they say."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path

from optwatch import __version__
from optwatch.agent.boards import Boards
from optwatch.agent.collect import Collector
from optwatch.agent.election import Election
from optwatch.agent.nvml import NvmlSampler
from optwatch.agent.server import Response, Server
from optwatch.agent.settings import Settings
from optwatch.board import board_directory, secure_directory
from optwatch.exporters.base import Snapshot
from optwatch.exporters.prometheus import PrometheusExporter

log = logging.getLogger("optwatch.agent")

_WILDCARDS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not bound to


class Agent:
    """One agent of one directory; `serve` is the usual way to run one."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        self._directory, self._settings = directory, settings
        self._boards = Boards(directory, settings.grace)
        self._nvml = NvmlSampler(settings.device_interval, settings.device_limit)
        self._collector = Collector(self._boards, self._nvml, settings.series)
        self._prometheus = PrometheusExporter()
        self._guard = threading.Lock()  # of the boards and of all that is made from them
        self._snapshot: Snapshot | None = None  # of the newest poll, made when first asked for
        self._polled = self._busy = time.monotonic()
        self._stopping = threading.Event()
        self._server: Server | None = None

    def start(self, election: Election) -> str:
        """Read the boards, bind and publish the address, which is returned. Raises OSError if no port is free."""
        self._poll()
        pages = {"/metrics": self._metrics, "/healthz": self._healthy, "/-/ready": self._ready}
        self._server = Server.on_free_port(self._settings.host, self._settings.port, pages)
        self._server.start()
        host = _WILDCARDS.get(self._settings.host, self._settings.host)
        url = f"http://{f'[{host}]' if ':' in host else host}:{self._server.port}/metrics"
        election.publish({"url": url, "pid": os.getpid(), "started": time.time(), "version": __version__})
        log.info("serving %s from the boards in %s", url, self._directory)
        self._nvml.start()
        return url

    def run(self) -> None:
        """Poll until `stop`, or until no rank has lived for so many seconds and none is in its grace period."""
        while not self._stopping.wait(self._settings.interval):
            try:
                self._poll()
            except Exception:  # one sick board or file system must not take the others' metrics with it
                log.exception("the boards could not be read")
            idle = 0.0 if self._boards.ranks else time.monotonic() - self._busy
            exit_when_idle = self._settings.exit_when_idle
            if exit_when_idle is not None and idle >= exit_when_idle:
                log.info("no boards for %g s, leaving", exit_when_idle)
                return

    def stop(self) -> None:
        """Make `run` return."""
        self._stopping.set()

    def close(self) -> None:
        """Stop serving and let go of everything; takes at most 2 s."""
        self._stopping.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._nvml.stop()
        with self._guard:
            self._boards.close()

    def _poll(self) -> None:
        with self._guard:
            self._boards.poll()
            self._snapshot = None
            self._polled = time.monotonic()
            if self._boards.living:
                self._busy = self._polled

    def _metrics(self, accept: str) -> Response:
        started = time.perf_counter()
        with self._guard:
            fresh = self._snapshot is None
            if self._snapshot is None:
                self._snapshot = self._collector.snapshot()
            self._prometheus.accept(self._snapshot)
            content_type, body = self._prometheus.render(accept)
            if fresh:
                self._collector.scrape_seconds = time.perf_counter() - started
        return 200, content_type, body

    def _healthy(self, _accept: str) -> Response:
        """Unwell when polling has stood still, for a reason such as a file system that hangs."""
        late = time.monotonic() - self._polled
        if late > 10 * self._settings.interval + 10:
            return 503, "text/plain", f"boards were last read {late:.0f} s ago\n".encode()
        return 200, "text/plain", b"ok\n"

    def _ready(self, _accept: str) -> Response:
        facts = {"version": __version__, "ranks": len(self._boards.ranks), "living": self._boards.living}
        return 200, "application/json", json.dumps(facts).encode() + b"\n"


def serve(directory: str | os.PathLike[str] | None = None, settings: Settings | None = None) -> bool:
    """Be the agent of ``directory`` (None: the user's own) until idle, or for ever.

    Returns False at once if another process is the agent of this directory. Raises BoardDirectoryError if the
    directory is not private or not writable, OSError if no port can be bound.
    """
    root = board_directory() if directory is None else secure_directory(directory)
    election = Election(root)
    if not election.win():
        log.info("another agent serves %s", root)
        return False
    agent = Agent(root, settings or Settings())
    try:
        agent.start(election)
        agent.run()
    finally:
        election.resign()
        agent.close()
    return True
