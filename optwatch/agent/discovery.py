"""Telling Prometheus where the agent is: files for file_sd, one for each run, and the same for http_sd.

A run's labels (``__meta_optwatch_run_id``, ``__meta_optwatch_job_id``) are there to relabel by. They are gone after
that, so that two runs on a node are one target and no series comes twice.
"""

from __future__ import annotations

import json
import logging
import socket
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from optwatch.agent.rank import Rank
from optwatch.board.replace import replace_file

log = logging.getLogger("optwatch.agent")

_WILDCARDS = {"", "0.0.0.0", "::"}  # noqa: S104 - compared with, not bound to


def advertised(host: str, port: int, given: str | None) -> str:
    """``host:port`` as others are to reach it."""
    name = given or (socket.gethostname() if host in _WILDCARDS else host)
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


class Discovery:
    """Target groups of the runs that an agent serves at ``url``; written to ``directory`` if there is one.

    Raises OSError if the directory cannot be written to.
    """

    def __init__(self, url: str, boards: Path, directory: str | None) -> None:
        parts = urlsplit(url)
        self._target, self._scheme, self._path = parts.netloc, parts.scheme, parts.path
        self._directory = None if directory is None else Path.cwd() / directory
        # An agent is the only one of its boards' directory, so these files are its own, or left by a killed one.
        self._prefix = f"optwatch-{socket.gethostname()}-{zlib.crc32(bytes(boards)):08x}-"
        self._written: dict[str, bytes] = {}
        self._failing = False
        if self._directory is not None:
            for left in self._directory.glob(f"{self._prefix}*.json"):
                left.unlink(missing_ok=True)
            probe = self._directory / f"{self._prefix}.probe"
            try:
                replace_file(probe, b"")
                probe.unlink()
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._directory)) from error

    def groups(self, ranks: Iterable[Rank]) -> list[dict[str, Any]]:
        """One target group for each run."""
        runs = {rank.labels["run_id"]: rank for rank in ranks}
        return [self._group(run, rank) for run, rank in sorted(runs.items())]

    def update(self, ranks: Iterable[Rank]) -> None:
        """Write what has changed and take away what is over; never raises for what the file system does."""
        if self._directory is None:
            return
        wanted = {
            f"{self._prefix}{group['labels']['__meta_optwatch_run_id']}.json": json.dumps([group]).encode()
            + b"\n"
            for group in self.groups(ranks)
        }
        try:
            for name in self._written.keys() - wanted.keys():
                (self._directory / name).unlink(missing_ok=True)
            for name, content in wanted.items():
                if self._written.get(name) != content:
                    replace_file(self._directory / name, content, 0o644)
            self._written, self._failing = wanted, False
        except OSError as error:
            if not self._failing:
                log.warning("%s cannot be written, trying on: %s", self._directory, error.strerror)
            self._failing = True

    def _group(self, run: str, rank: Rank) -> dict[str, Any]:
        labels = {
            "__scheme__": self._scheme,
            "__metrics_path__": self._path,
            "__meta_optwatch_run_id": run,
            "__meta_optwatch_job_id": str(rank.schema.run.get("job_id", "")),
        }
        return {"targets": [self._target], "labels": labels}
