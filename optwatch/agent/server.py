"""The HTTP side: a few small pages for GET, and limits on everything a client can do."""

from __future__ import annotations

import errno
import functools
import io
import json
import logging
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, TypeAlias
from urllib.parse import parse_qsl

from optwatch.agent.webconfig import WebConfig

log = logging.getLogger("optwatch.agent")

_NEXT_PORTS = 16  # tried in order before any free one
_REQUEST_BYTES = 16 << 10  # request line and headers together
_REQUEST_SECONDS = 5.0  # for the whole request, so that a byte at a time gains nothing
_CONNECTIONS = 32


@dataclass(frozen=True)
class Request:
    """What a page may know of a request."""

    accept: str  # the Accept header
    query: Mapping[str, str]  # parameters of the address


@dataclass(frozen=True)
class Response:
    """What a page answers."""

    status: int
    content_type: str
    body: bytes

    @classmethod
    def text(cls, status: int, line: str) -> Response:
        """One line of plain text."""
        return cls(status, "text/plain", f"{line}\n".encode())

    @classmethod
    def json(cls, value: object) -> Response:
        """A JSON document."""
        return cls(200, "application/json", json.dumps(value, allow_nan=False).encode() + b"\n")


Page: TypeAlias = Callable[[Request], Response]


class _TooLargeError(Exception):
    """A request longer than allowed."""


class _Bounded(io.RawIOBase):
    """A socket's bytes up to a size and a point in time."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._left = _REQUEST_BYTES
        self._deadline = time.monotonic() + _REQUEST_SECONDS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if self._left <= 0:
            raise _TooLargeError
        self._connection.settimeout(left)
        size = self._connection.recv_into(memoryview(buffer)[: self._left])
        self._left -= size
        self._connection.settimeout(_REQUEST_SECONDS)
        return size


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version = "optwatch"
    sys_version = ""
    timeout = _REQUEST_SECONDS

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Bounded(self.connection))

    def handle(self) -> None:
        try:
            super().handle()
        except _TooLargeError:
            self.request_version = "HTTP/1.0"
            self._answer(431, "text/plain", b"request too large\n")
        except (ConnectionError, TimeoutError, ssl.SSLError):
            pass  # the client went away, or would not take its answer

    def parse_request(self) -> bool:
        """Refuse strangers, and other methods before looking for a handler: 405 with what is allowed, not 501."""
        if not super().parse_request():
            return False
        if not self.server.web.authorised(self.headers.get("Authorization")):
            self._answer(401, "text/plain", b"unauthorized\n", {"WWW-Authenticate": "Basic"})
            return False
        if self.command == "GET":
            return True
        self._answer(405, "text/plain", b"only GET\n", {"Allow": "GET"})
        return False

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        page = self.server.pages.get(path)
        if page is None:
            self._answer(404, "text/plain", b"not found; see /metrics\n")
            return
        try:
            answer = page(
                Request(self.headers.get("Accept", ""), dict(parse_qsl(query, keep_blank_values=True)))
            )
        except Exception:  # one page that fails must not look like a connection that failed
            log.exception("%s failed", path)
            answer = Response.text(500, "failed; the agent's log says why")
        self._answer(answer.status, answer.content_type, answer.body)

    def _answer(
        self, status: int, content_type: str, body: bytes, more: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            **self.server.web.access().headers,
            **(more or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        log.debug("%s: %s", self.client_address[0], format % args)


class Server(ThreadingMixIn, TCPServer):
    """Serves `pages` from threads of its own. Raises OSError if it can bind to no port at all."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, host: str, port: int, pages: Mapping[str, Page], web: WebConfig | None = None) -> None:
        self.pages, self.web = pages, web or WebConfig()
        self._serving = False
        self._slots = threading.BoundedSemaphore(_CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)

    @classmethod
    def on_free_port(
        cls, host: str, port: int, pages: Mapping[str, Page], web: WebConfig | None = None
    ) -> Server:
        """Bind to the port, else one of the next ones, else any free one."""
        last = min(port + _NEXT_PORTS, 65536)
        for candidate in (*range(port, last), 0) if port else (0,):
            try:
                server = cls(host, candidate, pages, web)
            except (UnicodeError, TypeError) as error:  # which of them depends on the version of Python
                raise OSError(errno.EINVAL, "is no host name", host) from error
            except OSError as error:
                if candidate == 0 or isinstance(error, socket.gaierror):
                    raise OSError(error.errno, error.strerror, f"{host}:{port}") from error
                log.debug("port %d: %s", candidate, error.strerror)
                continue
            if candidate != port:
                log.warning("port %d of %s is taken, serving on %d", port, host, server.port)
            return server
        raise AssertionError("port 0 either binds or raises")

    @property
    def port(self) -> int:
        """The port it is bound to."""
        return int(self.server_address[1])

    def start(self) -> None:
        """Serve from a thread until `shutdown`."""
        self._serving = True
        # It looks so often whether it is to end.
        serve = functools.partial(self.serve_forever, poll_interval=0.1)
        threading.Thread(target=serve, name="optwatch-http", daemon=True).start()

    def stop(self) -> None:
        """Serve no more and let go of the port."""
        if self._serving:
            self.shutdown()
        self.server_close()

    @property
    def scheme(self) -> str:
        """``https`` with a certificate, else ``http``."""
        return "http" if self.web.access().context is None else "https"

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands first where there is a certificate, in the connection's own thread and with a time limit."""
        access = self.web.access()
        if access.context is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(_REQUEST_SECONDS)
        try:
            with access.context.wrap_socket(request, server_side=True) as secured:
                if access.admits(secured):
                    super().finish_request(secured, client_address)
                    secured.settimeout(_REQUEST_SECONDS)
                    secured.unwrap()
        except OSError as error:  # no TLS, no certificate, or gone
            log.debug("%s: %s", client_address[0], error)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Refuse what is beyond the limit of connections."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Give the connection's place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log it; the base class prints."""
        log.error("a request from %s failed: %r", client_address, sys.exc_info()[1])
