"""The live page and what it asks for: the runs that are served, and their history from the local store."""

from __future__ import annotations

import json
import logging
import math
import sqlite3
from collections.abc import Mapping

from optwatch.agent.server import Page, Request, Response
from optwatch.exporters.store import LocalStore, StoreError, curves
from optwatch.pages import live_page

log = logging.getLogger("optwatch.agent")

_MOST_POINTS, _LEAST_POINTS, _ALL_POINTS = 600, 60, 100_000

_LATEST = 1e11  # seconds; far beyond any clock, and still a number that can be counted with


class HistoryPages:
    """Answers of the addresses in `pages`."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self.pages: Mapping[str, Page] = {
            "/": self._page,
            "/api/runs": self._runs,
            "/api/history": self._history,
        }

    def _page(self, _: Request) -> Response:
        return Response(200, "text/html; charset=utf-8", live_page())

    def _runs(self, _: Request) -> Response:
        """Ids of the runs, the newest first."""
        return Response.json({"runs": list(reversed(self._store.runs))})

    def _history(self, request: Request) -> Response:
        """Curves of the run ``run``, of what happened after the Unix time ``since``."""
        try:
            since = float(request.query.get("since", "0"))
        except ValueError:
            since = math.nan
        if not 0 <= since < _LATEST:
            return Response.text(400, "since: expected a Unix time in seconds")
        name = request.query.get("run", "")
        run = self._store.runs.get(name)
        if run is None:
            return Response.text(404, "no such run is served; see /api/runs")
        # The points of all curves together are bounded, and none is kept longer than it takes to write it down: on a
        # node with many ranks a run has thousands of curves, and the agent little memory.
        points = min(_MOST_POINTS, max(_LEAST_POINTS, _ALL_POINTS // max(1, run.width)))
        try:
            parts = b",".join(_encoded(curve) for curve in curves(run, since, points))
            return Response(200, "application/json", b'{"run":%b,"curves":[%b]}\n' % (_encoded(name), parts))
        except (sqlite3.Error, StoreError) as error:  # such as a run that ended meanwhile
            log.info("the history of %s cannot be shown: %s", name, error)
            return Response.text(503, "the history of this run cannot be read now")


def _encoded(value: object) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
