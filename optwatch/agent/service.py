"""The agent: polls the boards, samples the node, serves what they say."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from optwatch import __version__
from optwatch.agent import tensors
from optwatch.agent.boards import Boards
from optwatch.agent.collect import Collector
from optwatch.agent.discovery import Discovery, advertised
from optwatch.agent.election import Election
from optwatch.agent.history import HistoryPages
from optwatch.agent.nvml import NvmlSampler
from optwatch.agent.server import Page, Request, Response, Server
from optwatch.agent.settings import Settings
from optwatch.agent.webconfig import WebConfig
from optwatch.board import BoardDirectoryError, board_directory, may_serve, secure_directory
from optwatch.board.address import LOCK
from optwatch.exporters.base import Exporter, Snapshot, Values
from optwatch.exporters.otlp import OtlpError, OtlpExporter, OtlpSettings
from optwatch.exporters.prometheus import PrometheusExporter
from optwatch.exporters.store import LocalStore, store_directory
from optwatch.exporters.textfile import TextFileExporter

log = logging.getLogger("optwatch.agent")

_WILDCARDS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not bound to
_TEXTFILE_SECONDS = 2.0
_STORE_SECONDS = 1.0


@dataclass
class _Sink:
    """An exporter that is given a snapshot now and then."""

    exporter: Exporter
    interval: float
    due: float = 0.0


class Agent:
    """One agent of one directory; `serve` is the usual way to run one.

    Raises OtlpError, WebConfigError or OSError if what was asked for cannot be had.
    """

    def __init__(self, directory: Path, settings: Settings) -> None:
        self._directory, self._settings = directory, settings
        self._boards = Boards(directory, settings.grace)
        self._nvml = NvmlSampler(settings.device_interval, settings.device_limit)
        self._web = WebConfig(settings.web_config)
        self._sinks, values = _sinks(settings)
        store = LocalStore(_store_directory(settings))
        self._history = HistoryPages(store)
        self._sinks.append(_Sink(store, _STORE_SECONDS))
        values.append(store.points)
        self._collector = Collector(self._boards, self._nvml, settings.series, *values)
        self._prometheus = PrometheusExporter()
        self._guard = threading.Lock()  # of the boards and of all that is made from them
        # Taken before the guard: an older poll must not replace what a newer one's scrape says.
        self._rendering = threading.Lock()
        self._snapshot: Snapshot | None = None  # of the newest poll, made when first asked for
        self._polled = self._busy = time.monotonic()
        self._stopping = threading.Event()
        self._server: Server | None = None
        self._discovery: Discovery | None = None
        self._problem = ""  # the newest one of the boards, said once

    def start(self, election: Election) -> str:
        """Read the boards, bind and publish the address, which is returned. Raises OSError if no port is free."""
        self._poll()
        settings = self._settings
        self._server = Server.on_free_port(settings.host, settings.port, self._pages(), self._web)
        host = _WILDCARDS.get(settings.host, settings.host)
        scheme, port = self._server.scheme, self._server.port
        url = f"{scheme}://{advertised(host, port, None)}/metrics"
        outside = f"{scheme}://{advertised(settings.host, port, settings.advertise)}/metrics"
        self._discovery = Discovery(outside, self._directory, settings.file_sd)
        self._discovery.update(self._boards.ranks.values())
        self._server.start()
        self._election = election
        self._facts = {"url": url, "pid": os.getpid(), "started": time.time(), "version": __version__}
        election.publish(self._facts)
        self._published = True
        log.info("serving %s from the boards in %s", url, self._directory)
        self._nvml.start()
        return url

    def run(self) -> None:
        """Poll until `stop`, or until no rank has lived for so many seconds and none is in its grace period.

        Also until another process has become the agent, after somebody removed this one's lock.
        """
        while not self._stopping.wait(self._settings.interval):
            try:
                self._poll()
                if self._prometheus.wanted:
                    self._refresh()
                self._hand_out()
                if not self._still_elected():
                    return
                self._problem = ""
            except (
                Exception
            ) as error:  # one sick board or file system must not take the others' metrics with it
                if repr(error) != self._problem:
                    log.exception("the boards could not be read")
                self._problem = repr(error)
            idle = 0.0 if self._boards.ranks else time.monotonic() - self._busy
            exit_when_idle = self._settings.exit_when_idle
            if exit_when_idle is not None and idle >= exit_when_idle:
                log.info("no boards for %g s, leaving", exit_when_idle)
                return

    def stop(self) -> None:
        """Make `run` return."""
        self._stopping.set()

    def close(self) -> None:
        """Stop serving, send the last values and let go of everything; takes 2 s at most."""
        self._stopping.set()
        if self._server is not None:
            self._server.stop()
        if self._discovery is not None:
            self._discovery.update(())
        self._nvml.stop()
        with self._guard:
            last = self._newest()
            self._boards.close()
        for sink in self._sinks:
            sink.exporter.accept(last)
            sink.exporter.close()

    def _poll(self) -> None:
        with self._guard:
            self._boards.poll()
            self._snapshot = None
            self._polled = time.monotonic()
            if self._boards.living:
                self._busy = self._polled
            if self._discovery is not None:
                self._discovery.update(self._boards.ranks.values())

    def _still_elected(self) -> bool:
        if not self._election.held:
            self._published = False
            if not self._election.renew():
                log.warning("%s was removed and another agent has taken it, leaving", self._directory / LOCK)
                return False
        if not self._published and self._election.held:
            self._election.publish(self._facts)
            self._published = True
            log.warning("%s was removed and has been made again", self._directory / LOCK)
        return True

    def _hand_out(self) -> None:
        """Give the newest snapshot to the exporters whose time has come."""
        now = time.monotonic()
        for sink in self._sinks:
            if now >= sink.due:
                sink.due = now + sink.interval
                with self._guard:
                    snapshot = self._newest()
                sink.exporter.accept(snapshot)

    def _newest(self) -> Snapshot:
        if self._snapshot is None:
            self._snapshot = self._collector.snapshot()
        return self._snapshot

    def _pages(self) -> Mapping[str, Page]:
        return {
            "/metrics": self._metrics,
            "/healthz": self._healthy,
            "/readyz": self._ready,
            "/sd": self._targets,
            **self._history.pages,
            "/tensors": self._tensors,
        }

    def _refresh(self, accept: str | None = None) -> None:
        """Render the newest poll in the formats that are asked for, and in ``accept``'s; the boards are free then."""
        with self._rendering:
            started = time.perf_counter()
            with self._guard:
                fresh = self._snapshot is None
                snapshot = self._newest()
            self._prometheus.accept(snapshot)
            if accept is not None:
                self._prometheus.render(accept)
            if fresh:
                self._collector.scrape_seconds = time.perf_counter() - started

    def _metrics(self, request: Request) -> Response:
        """Where scrapes are usual these are bytes already, and nobody waits for the boards."""
        if self._late > 0:  # what is stale must not pass for fresh
            return self._healthy(request)
        if not self._prometheus.wanted:
            self._refresh(request.accept)
        return Response(200, *self._prometheus.render(request.accept))

    @property
    def _late(self) -> float:
        """Seconds since the boards were last read, 0 while that is not long ago."""
        late = time.monotonic() - self._polled
        return late if late > 10 * self._settings.interval + 10 else 0.0

    def _healthy(self, _: Request) -> Response:
        """Unwell when polling has stood still, for a reason such as a file system that hangs."""
        if late := self._late:
            return Response.text(503, f"boards were last read {late:.0f} s ago")
        return Response.text(200, "ok")

    def _ready(self, _: Request) -> Response:
        """Ready from the first poll on, which comes before the address is bound."""
        ranks, living = len(self._boards.ranks), self._boards.living
        return Response.json({"version": __version__, "ranks": ranks, "living": living})

    def _tensors(self, request: Request) -> Response:
        """The tensors with the largest values, by name: as labels they would make new series with every change."""
        try:
            count = tensors.count_of(request.query)
        except ValueError as error:
            return Response.text(400, str(error))
        with self._guard:
            return Response.json(tensors.largest(self._boards.ranks.values(), request.query, count))

    def _targets(self, _: Request) -> Response:
        """Prometheus' http_sd."""
        with self._guard:
            return Response.json(
                [] if self._discovery is None else self._discovery.groups(self._boards.ranks.values())
            )


def _sinks(settings: Settings) -> tuple[list[_Sink], list[Values]]:
    """The exporters that were asked for, and what tells of their own state."""
    sinks: list[_Sink] = []
    values: list[Values] = []
    if settings.textfile is not None:
        sinks.append(_Sink(TextFileExporter(settings.textfile), _TEXTFILE_SECONDS))
    try:
        otlp = OtlpSettings.read(settings.otlp_endpoint, settings.otlp_protocol, settings.otlp_interval)
        if otlp is not None:
            exporter = OtlpExporter(otlp)
            sinks.append(_Sink(exporter, otlp.interval))
            values.append(exporter.points)
    except OtlpError as error:
        if settings.otlp_endpoint is not None:
            raise
        # Variables that are there for others, too, must not keep the agent from serving.
        log.warning("nothing is pushed over OTLP: %s", error)
    return sinks, values


def _store_directory(settings: Settings) -> Path | None:
    """Where runs are kept; None for in memory only. Raises OSError if it was asked for and cannot be written to."""
    if settings.store is None:
        return store_directory()
    if settings.store == "off":
        return None
    directory = Path.cwd() / settings.store
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700, parents=True)
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is not a directory", str(directory))
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "is not writable", str(directory))
    return directory


def _check(settings: Settings) -> None:
    """Raise what an `Agent` would for what cannot be had: a mistake is one also where another agent serves already."""
    WebConfig(settings.web_config)
    _store_directory(settings)
    if settings.otlp_endpoint is not None:
        OtlpSettings.read(settings.otlp_endpoint, settings.otlp_protocol, settings.otlp_interval)


def serve(directory: str | os.PathLike[str] | None = None, settings: Settings | None = None) -> bool:
    """Be the agent of ``directory`` (None: the user's own) until idle, or for ever.

    Returns False at once if another process is the agent of this directory. Raises BoardDirectoryError if the
    directory is not private or not writable, or shared by another user; OSError if no port can be bound or a file
    that was asked for cannot be made; OtlpError or WebConfigError if OTLP or a web-config file was asked for and
    cannot be used.
    """
    root = board_directory() if directory is None else secure_directory(directory)
    if not may_serve(root):
        raise BoardDirectoryError(
            f"{root}: is shared; its agent runs as its owner, user {root.stat().st_uid}"
        )
    settings, election = settings or Settings(), Election(root)
    if not election.win():
        _check(settings)
        log.info("another agent serves %s, with settings of its own", root)
        return False
    agent = None
    try:
        agent = Agent(root, settings)
        agent.start(election)
        agent.run()
    finally:
        election.resign()
        if agent is not None:
            agent.close()
    return True


def snapshot_once(directory: str | os.PathLike[str] | None, settings: Settings) -> bytes:
    """The scrape of this moment, as text, without being the agent: boards are read and left as they are.

    Raises BoardDirectoryError as `serve` does.
    """
    root = board_directory() if directory is None else secure_directory(directory)
    boards = Boards(root, settings.grace, tidy=False)
    nvml = NvmlSampler(settings.device_interval, settings.device_limit)
    exporter = PrometheusExporter()
    try:
        boards.poll()
        nvml.sample_once()
        exporter.accept(Collector(boards, nvml, settings.series).snapshot())
        return exporter.render()[1]
    finally:
        boards.close()
