"""A file for node_exporter's textfile collector: the scrape as text, for nodes whose only scraper that is."""

from __future__ import annotations

import logging
from pathlib import Path

from optwatch.board.replace import replace_file
from optwatch.exporters.base import Snapshot
from optwatch.exporters.prometheus import PrometheusExporter

log = logging.getLogger("optwatch.agent")


class TextFileExporter:
    """Writes each snapshot to a file that ends in ``.prom``, readable by all, and takes it away in the end.

    Raises OSError if the file cannot be made; later failures are said once and tried on.
    """

    name = "textfile"

    def __init__(self, path: str) -> None:
        self._path = Path.cwd() / path
        self._failing = False
        self._prometheus = PrometheusExporter()
        replace_file(self._path, b"", 0o644)

    def accept(self, snapshot: Snapshot) -> None:
        """Replace the file."""
        self._prometheus.accept(snapshot)
        try:
            replace_file(self._path, self._prometheus.render()[1], 0o644)
        except OSError as error:
            if not self._failing:
                log.warning("%s cannot be written, trying on: %s", self._path, error.strerror)
            self._failing = True
        else:
            self._failing = False

    def close(self) -> None:
        """Take the file away: what it says is old from now on."""
        self._path.unlink(missing_ok=True)
