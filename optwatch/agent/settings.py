"""How an agent behaves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The settings of an agent; each is an option of ``python -m optwatch.agent`` of the same name."""

    host: str = "127.0.0.1"  # address to bind to
    port: int = 9464  # first port to try; the next ones and then any free one follow
    advertise: str | None = None  # host under which others reach it; None = `host`, or this machine's name
    web_config: str | None = None  # web-config.yml with TLS and passwords; None = plain and open
    interval: float = 0.5  # seconds between polls: looks live, and a board's rings hold seconds more
    grace: float = 300.0  # seconds to serve the last values of a rank that ended
    series: int = 300  # series of one rank at most; what is beyond is counted
    device_interval: float = 2.0  # seconds between samples of the GPUs
    device_limit: float = 2.0  # seconds until a call of the GPU driver counts as hung
    exit_when_idle: float | None = None  # leave after so many seconds without boards; None = never
    textfile: str | None = None  # file for node_exporter's textfile collector
    file_sd: str | None = None  # directory for Prometheus' file_sd, a file for each run
    otlp_endpoint: str | None = (
        None  # collector to push to; None = OpenTelemetry's environment variables decide
    )
    otlp_protocol: str | None = None  # grpc or http/protobuf; None = as above, else http/protobuf
    otlp_interval: float | None = None  # seconds between pushes; None = as above, else 15
    store: str | None = None  # directory of the local store, "off" = in memory; None = `store_directory`
