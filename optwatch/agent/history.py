"""The live page and what it asks for: the runs that are served, and their history from the local store."""

from __future__ import annotations

import math
from collections.abc import Mapping

from optwatch.agent.server import Page, Request, Response
from optwatch.exporters.store import LocalStore, curves
from optwatch.pages import live_page


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
        if not math.isfinite(since):
            return Response.text(400, f"since={request.query['since']}: expected a Unix time in seconds")
        name = request.query.get("run", "")
        run = self._store.runs.get(name)
        if run is None:
            return Response.text(404, "no such run is served; see /api/runs")
        return Response.json({"run": name, "curves": curves(run, since)})
