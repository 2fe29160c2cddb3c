"""The agent's log: lines for people, or one JSON object a line for machines."""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import datetime, timezone

FORMATS = ("text", "json")


class JsonFormatter(logging.Formatter):
    """``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message`` and, where one was caught, ``error``."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        facts = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            facts["error"] = self.formatException(record.exc_info)
        return json.dumps(facts)


class Budget(logging.Filter):
    """Lets so many lines through at once and one more every so many seconds, and says how many were left out.

    The log of an agent that a training process started lies in shared memory beside the boards: nothing that goes
    wrong for days may fill it.
    """

    def __init__(self, lines: int = 100, seconds: float = 10.0) -> None:
        super().__init__()
        self._most, self._seconds = lines, seconds
        self._left, self._refilled, self._silenced = float(lines), time.monotonic(), 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether there is room for the record. Called by one thread at a time, since handlers lock."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._refilled) / self._seconds)
        self._refilled = now
        if self._left < 1:
            self._silenced += 1
            return False
        self._left -= 1
        if self._silenced:
            record.msg, record.args = (
                f"{record.getMessage()} ({self._silenced} lines before were left out)",
                (),
            )
            self._silenced = 0
        return True


def set_up(kind: str) -> None:
    """Log to stderr in this format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Budget())
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if kind == "json" else text)
    logging.basicConfig(handlers=[handler], level=logging.INFO)
