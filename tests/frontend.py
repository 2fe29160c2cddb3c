"""Grafana's own front-end libraries in a real browser: the page of tools/frontend, built, served and opened.

It is no Grafana server: tools/frontend reads a dashboard's JSON and draws it, against any Prometheus, with the
libraries that Grafana's pages are made of.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import threading
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tools" / "frontend"
DASHBOARDS = ROOT / "optwatch" / "dashboards"
_FONTS = FOLDER / "node_modules" / "@fontsource" / "inter" / "files"

WAIT = 60  # seconds for a page to be drawn, on a machine with other things to do


def build() -> None:
    """Install what package-lock.json names and bundle it, unless that is done.

    Without npm, or what it fetches, the test skips, which CI counts as a failure.
    """
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip(
            "npm is not installed: install Node.js 18 or newer to draw the dashboards as Grafana does"
        )
    lock, installed = FOLDER / "package-lock.json", FOLDER / "node_modules" / ".package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        complaint = _run([npm, "ci", "--no-progress"])
        if complaint:
            pytest.skip(f"Grafana's packages could not be installed: {complaint}")
        installed.touch()
    bundle = FOLDER / "dist" / "main.js"
    sources = [installed, FOLDER / "build.mjs", *(FOLDER / "src").iterdir()]
    if not bundle.exists() or bundle.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        complaint = _run([node, "build.mjs"])
        assert not complaint, complaint


def _run(command: Sequence[str]) -> str:
    """The end of what the command said, if it failed."""
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=500, check=False)
    return (done.stdout + done.stderr)[-2000:] or "failed" if done.returncode else ""


#: Where a Grafana server has these files: where they are here.
PLACES = {
    "/dashboards/": DASHBOARDS,
    "/public/fonts/inter/Inter-Regular.woff2": _FONTS / "inter-latin-400-normal.woff2",
    "/public/fonts/inter/Inter-Medium.woff2": _FONTS / "inter-latin-500-normal.woff2",
    "/public/build/img/": FOLDER / "node_modules" / "@grafana" / "ui" / "dist" / "public" / "img",
}


class _Handler(http.server.SimpleHTTPRequestHandler):
    """The front end's folder, and what its pages ask for besides."""

    def translate_path(self, path: str) -> str:
        name = urllib.parse.urlsplit(path).path
        for start, place in PLACES.items():
            if name.startswith(start):
                return str(place / name.removeprefix(start)) if place.is_dir() else str(place)
        return super().translate_path(path)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def served() -> Iterator[str]:
    """The address of the page."""
    build()
    handler = functools.partial(_Handler, directory=str(FOLDER))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def draw(
    browser: webdriver.Chrome,
    page: str,
    dashboard: str,
    prometheus: str,
    *,
    start: str = "now-5m",
    end: str = "now",
    scrape: str = "1s",
    rows: Sequence[str] = (),
    panels: Sequence[str] = (),
    chosen: Mapping[str, str] | None = None,
) -> None:
    """Open a dashboard and wait until every panel has its data.

    ``start`` and ``end`` are as in Grafana's addresses, ``rows`` and ``panels`` the titles of those to draw (all by
    default; panels alone stand side by side), ``chosen`` what is chosen for the variables.
    """
    query = [
        ("dashboard", dashboard),
        ("prometheus", prometheus),
        ("scrape", scrape),
        ("from", start),
        ("to", end),
    ]
    query += [("row", row) for row in rows]
    query += [("panel", panel) for panel in panels]
    query += [(f"var-{name}", value) for name, value in (chosen or {}).items()]
    browser.get(f"{page}?{urllib.parse.urlencode(query)}")
    state = "return document.body.dataset.state"
    WebDriverWait(browser, WAIT).until(lambda driver: driver.execute_script(state))
    complaint = f"{dashboard} was not drawn: {browser.get_log('browser')}"
    assert browser.execute_script(state) == "done", complaint
