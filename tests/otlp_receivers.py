"""Real OTLP receivers on loopback, over gRPC and HTTP, that can refuse, be slow or never answer."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)


class Received:
    """What came in, and how to behave: seconds to wait before the answer, and whether to refuse."""

    def __init__(self) -> None:
        self.requests: list[ExportMetricsServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        self.wait, self.refuse = 0.0, False
        self.ended = threading.Event()
        self.url = ""

    def take(self, request: ExportMetricsServiceRequest, headers: dict[str, str]) -> bool:
        """Keep the request; False when it is to be refused."""
        self.ended.wait(self.wait)
        if not self.refuse:
            self.requests.append(request)
            self.headers.append({name.lower(): value for name, value in headers.items()})
        return not self.refuse

    def wait_for(self, count: int = 1, seconds: float = 20.0) -> ExportMetricsServiceRequest:
        """The newest request as soon as there are so many."""
        end = time.monotonic() + seconds
        while len(self.requests) < count:
            assert time.monotonic() < end, f"{len(self.requests)} requests in {seconds} s, expected {count}"
            time.sleep(0.02)
        return self.requests[-1]


@contextmanager
def over_grpc() -> Iterator[Received]:
    """A collector that speaks gRPC."""
    received = Received()

    class Servicer(MetricsServiceServicer):
        def Export(self, request, context):  # noqa: N802 - the protocol's name
            if not received.take(request, dict(context.invocation_metadata())):
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "refused")
            return ExportMetricsServiceResponse()

    server = grpc.server(ThreadPoolExecutor(4))
    add_MetricsServiceServicer_to_server(Servicer(), server)
    received.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield received
    finally:
        received.ended.set()
        server.stop(None).wait()


@contextmanager
def over_http() -> Iterator[Received]:
    """A collector that speaks HTTP."""
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            request = ExportMetricsServiceRequest.FromString(body)
            taken = self.path == "/v1/metrics" and received.take(request, dict(self.headers))
            self.send_response(200 if taken else 400)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    received.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield received
    finally:
        received.ended.set()
        server.shutdown()
        server.server_close()


RECEIVERS = {"grpc": over_grpc, "http/protobuf": over_http}
