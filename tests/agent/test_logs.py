"""The agent's log: it lies in shared memory, so nothing may fill it."""

from __future__ import annotations

import io
import json
import logging

import pytest

from optwatch.agent import logs


def test_a_flood_is_cut_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many lines at once, then one now and then, which says how many were left out; all of it valid JSON."""
    now = 0.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    handler.addFilter(logs.Budget(lines=5, seconds=10.0))
    log = logging.getLogger("optwatch.test_logs")
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "propagate", False)
    for second in range(100):
        now = float(second)
        log.warning("%d %% \n", second)
    lines = [json.loads(line)["message"] for line in stream.getvalue().splitlines()]
    assert lines[:5] == [f"{second} % \n" for second in range(5)]
    assert len(lines) == 5 + 9
    assert lines[-1].endswith("(9 lines before were left out)")
