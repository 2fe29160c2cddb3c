"""Pages of plots: the one the agent serves, and the report of a stored run.

Both are one HTML file that asks for nothing outside itself: style, script and uPlot (MIT, in ``uplot/`` with its
licence) are put into it. They differ in where the data comes from only.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

from optwatch.exporters.store.curves import Curve
from optwatch.metrics.catalogue import CATALOGUE

# Content-Security-Policy: a page may talk to the agent that served it, a report to nobody.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src {talk}; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


def live_page() -> bytes:
    """The page that shows an agent's runs and follows them."""
    return _page("optwatch", {"live": True, **_catalogue()})


def report_page(run_id: str, facts: dict[str, str], curves: Iterable[Curve]) -> bytes:
    """One stored run as a page that can be mailed or kept."""
    data = {"live": False, "run": run_id, "facts": facts, "curves": list(curves)}
    return _page(f"{run_id} - optwatch report", {**data, **_catalogue()})


def _catalogue() -> dict[str, Any]:
    """What a reader is told about each metric, by family, in the catalogue's order."""
    return {
        "families": {
            family: {
                spec.name: {"brief": spec.brief, "unit": spec.unit, "instrument": spec.instrument}
                for spec in specs
            }
            for family, specs in CATALOGUE.families.items()
        }
    }


def _page(title: str, data: dict[str, Any]) -> bytes:
    # Inside a script element only "<" could end it.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        Template(_asset("page.html"))
        .substitute(
            title=html.escape(title),
            policy=_POLICY.format(talk="'self'" if data["live"] else "'none'"),
            style=_asset("uplot/uPlot.min.css") + _asset("page.css"),
            charts=_asset("uplot/uPlot.iife.min.js"),
            script=_asset("page.js"),
            data=text,
        )
        .encode()
    )


@cache
def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
