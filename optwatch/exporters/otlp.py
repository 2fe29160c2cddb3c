"""OTLP: pushes snapshots to an OpenTelemetry collector, over gRPC or HTTP, with the SDK's exporters.

Needs the extra ``otlp``; loading this module loads neither the SDK nor gRPC, opening an exporter does: 15 to 30 MB
that an agent which does not push need not pay.
"""
# ruff: noqa: PLC0415 - see above

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from optwatch.exporters.base import Point, Snapshot

if TYPE_CHECKING:
    from optwatch.exporters.otlp_data import Translator

log = logging.getLogger("optwatch.agent")

PROTOCOLS = ("grpc", "http/protobuf")
_QUEUE = (
    8  # snapshots that wait while the collector does not answer; all values are cumulative or of one moment
)
_BATCH = 4000  # points a request: gRPC's receivers take 4 MiB
_EXIT_SECONDS = 1.5  # the agent has 2 s for all of its end
_REASONS = ("refused", "overflow")


class OtlpError(Exception):
    """OTLP cannot be set up; the message is one line for the user."""


@dataclass(frozen=True)
class OtlpSettings:
    """Where to push, and how; headers, certificates and compression are read by the SDK from its environment."""

    endpoint: str
    protocol: str = "http/protobuf"
    interval: float = 15.0  # seconds between pushes

    @classmethod
    def read(
        cls,
        endpoint: str | None = None,
        protocol: str | None = None,
        interval: float | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> OtlpSettings | None:
        """What was given, else what OpenTelemetry's environment variables say; None if neither names an endpoint.

        Raises OtlpError for what makes no sense.
        """
        if endpoint is None and _unwanted(environment):
            return None
        chosen = protocol or _variable(environment, "PROTOCOL") or cls.protocol
        chosen = "http/protobuf" if chosen == "http" else chosen
        endpoint = endpoint or _endpoint(environment, chosen)
        if endpoint is None:
            return None
        if chosen not in PROTOCOLS:
            raise OtlpError(f"OTLP protocol {chosen!r}: expected one of {', '.join(PROTOCOLS)}")
        if interval is None:
            interval = _interval(environment.get("OTEL_METRIC_EXPORT_INTERVAL"), cls.interval)
        return cls(_checked(endpoint), chosen, interval)


class OtlpExporter:
    """Sends snapshots from a thread of its own, the oldest of too many waiting ones being dropped and counted.

    Nothing is registered with OpenTelemetry's global providers, and nothing runs at exit but `close`. Raises OtlpError
    if the extra is not installed or the SDK refuses its environment.
    """

    name = "otlp"

    def __init__(self, settings: OtlpSettings) -> None:
        self._endpoint = _without_secrets(settings.endpoint)
        self._started = time.time()
        self._exports = 0
        self._failures = Counter(dict.fromkeys(_REASONS, 0))
        self._failing = False
        self._queue: deque[tuple[float, Snapshot]] = deque()
        self._news = threading.Condition()
        self._busy = self._closing = False
        self._exporter, self._translator = _open(settings)
        self._thread = threading.Thread(target=self._work, name="optwatch-otlp", daemon=True)
        self._thread.start()

    def accept(self, snapshot: Snapshot) -> None:
        """Put the newest snapshot into the queue; never waits."""
        with self._news:
            if len(self._queue) >= _QUEUE:
                self._queue.popleft()
                self._failures["overflow"] += 1
            self._queue.append((time.time(), snapshot))
            self._news.notify_all()

    def points(self) -> Iterator[tuple[str, Point]]:
        """The exporter's own counters."""
        yield "optwatch.otlp_exports", Point({}, float(self._exports), self._started)
        for reason, count in self._failures.items():
            yield "optwatch.otlp_failures", Point({"reason": reason}, float(count), self._started)

    def close(self) -> None:
        """Send what is left, for at most 1.5 s; what then still waits is lost, and said."""
        end = time.monotonic() + _EXIT_SECONDS
        with self._news:
            while (self._queue or self._busy) and (left := end - time.monotonic()) > 0:
                self._news.wait(left)
            lost = len(self._queue) + self._busy
            self._closing = True
            self._queue.clear()
            self._news.notify_all()
        if lost:
            log.warning("OTLP: %d snapshots did not reach %s before the end", lost, self._endpoint)
        # The SDK waits for a request that is on its way: not here.
        closer = threading.Thread(target=self._exporter.shutdown, name="optwatch-otlp-close", daemon=True)
        closer.start()
        closer.join(max(0.0, end - time.monotonic()))

    def _work(self) -> None:
        while True:
            with self._news:
                while not self._queue and not self._closing:
                    self._news.wait()
                if self._closing:
                    return
                taken, snapshot = self._queue.popleft()
                self._busy = True
            sent = self._send(snapshot, taken)
            with self._news:
                self._exports += sent
                self._failures["refused"] += not sent
                self._busy = False
                self._news.notify_all()
            self._say(sent)

    def _send(self, snapshot: Snapshot, taken: float) -> bool:
        try:
            return bool(self._exporter.export(self._translator.data(snapshot, taken)).name == "SUCCESS")
        except Exception as error:  # noqa: BLE001 - whatever the collector or the SDK does, the next one is sent
            log.debug("OTLP: %r", error)
            return False

    def _say(self, sent: bool) -> None:
        """One line when pushing begins to fail, one when it works again."""
        if sent and self._failing:
            log.info("OTLP: %s takes metrics again", self._endpoint)
        elif not sent and not self._failing:
            log.warning("OTLP: %s does not take metrics; trying on", self._endpoint)
        self._failing = not sent


def _variable(environment: Mapping[str, str], name: str) -> str | None:
    """The variable for metrics, else the one for all signals."""
    prefix = "OTEL_EXPORTER_OTLP"
    return environment.get(f"{prefix}_METRICS_{name}") or environment.get(f"{prefix}_{name}")


def _unwanted(environment: Mapping[str, str]) -> bool:
    disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return disabled or environment.get("OTEL_METRICS_EXPORTER", "otlp") != "otlp"


def _endpoint(environment: Mapping[str, str], protocol: str) -> str | None:
    """As OpenTelemetry says: the one for metrics is complete, the one for all signals is a base."""
    found = _variable(environment, "ENDPOINT")
    if found and protocol != "grpc" and not environment.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"):
        return f"{found.rstrip('/')}/v1/metrics"
    return found


def _interval(milliseconds: str | None, default: float) -> float:
    if milliseconds is None:
        return default
    try:
        value = float(milliseconds) / 1e3
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise OtlpError(
            f"OTEL_METRIC_EXPORT_INTERVAL={milliseconds!r}: expected a positive number of milliseconds"
        )
    return value


def _without_secrets(endpoint: str) -> str:
    """As it may be logged: a name and a password for the collector are nobody else's."""
    parts = urlsplit(endpoint)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _checked(endpoint: str) -> str:
    try:
        parts = urlsplit(endpoint)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise OtlpError(f"OTLP endpoint {endpoint!r}: expected something like http://collector:4318")
    return endpoint


def _open(settings: OtlpSettings) -> tuple[Any, Translator]:
    """The SDK's exporter of the protocol. Over HTTP an endpoint without a path gets OTLP's own."""
    # Its exporters log every try; the one line that matters is ours.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    try:
        from optwatch.exporters.otlp_data import Translator

        if settings.protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as Grpc

            return Grpc(endpoint=settings.endpoint, max_export_batch_size=_BATCH), Translator()
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as Http

        parts = urlsplit(settings.endpoint)
        url = settings.endpoint if parts.path.strip("/") else parts._replace(path="/v1/metrics").geturl()
        return Http(endpoint=url, max_export_batch_size=_BATCH), Translator()
    except ImportError as error:
        raise OtlpError(
            f"pushing over OTLP needs the package {error.name}: pip install 'optwatch[otlp]'"
        ) from error
    except (OSError, ValueError) as error:
        raise OtlpError(f"OTLP cannot be set up, see OTEL_EXPORTER_OTLP_*: {error}") from error
