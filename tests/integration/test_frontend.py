"""Every panel of every dashboard, drawn by Grafana's own front-end libraries from a real run, in a real browser."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

import frontend
from browser import chromium
from node import Node, node

pytestmark = [pytest.mark.integration, pytest.mark.slow]

BOARDS = {path.stem: json.loads(path.read_text("utf-8")) for path in frontend.DASHBOARDS.glob("*.json")}
PANELS = [
    (name, panel) for name, board in BOARDS.items() for panel in board["panels"] if panel["type"] != "row"
]
LINES = [(name, panel) for name, panel in PANELS if panel["type"] == "timeseries"]

#: Panels that may have nothing to show in this run, and why. They say so in their own words, never "No data".
EMPTY = {
    "Alerts": "none may wait yet",
    "Worst update error": "there is none while a resume has made the state fp32",
    "Boards skipped": "every board can be read",
    "OTLP pushes a second": "the agent pushes to nobody",
}

#: What of a page can be read, by panel; at once, since it may be drawn again meanwhile. A canvas has a line if there
#: are points in the colour of one of the legend's entries.
READ = """
const colours = (canvas) => {
  const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  const found = [];
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 100) found.push([data[i], data[i + 1], data[i + 2]]);
  return found;
};
const near = (one, other) => one.every((part, i) => Math.abs(part - other[i]) < 40);
const read = (panel) => {
  const all = (selector) => [...panel.querySelectorAll(selector)];
  const points = all('.uplot canvas').flatMap(colours);
  const seen = (colour) => {
    const wanted = colour.match(/\\d+/g).map(Number);
    return points.some((point) => near(point, wanted));
  };
  return {
    title: panel.querySelector('h2')?.textContent ?? '',
    text: panel.querySelector('[data-testid="data-testid panel content"]')?.innerText ?? '',
    empty: panel.querySelector('.empty')?.textContent ?? null,
    errors: all('[data-testid="data-testid Alert error"], [data-testid="data-testid Panel status error"]').map(
      (error) => error.textContent || error.getAttribute('aria-label') || 'an error'),
    legend: all('[data-testid^="data-testid VizLegend series"]').map((entry) => entry.textContent),
    drawn: all('[data-testid="series-icon"]').some((icon) => seen(icon.style.background)),
    rows: all('[role="row"]').length,
    marks: Object.fromEntries(all('[data-mark]').map((mark) => [mark.dataset.mark, seen(mark.style.color)])),
  };
};
const panels = [...document.querySelectorAll('[data-viz-panel-key]')];
const variables = [...document.querySelectorAll('[data-testid="data-testid template variable"]')];
return {
  panels: Object.fromEntries(panels.map((panel) => [panel.dataset.vizPanelKey, read(panel)])),
  variables: Object.fromEntries(variables.map((one) => [...one.children].map((part) => part.textContent))),
};
"""


@dataclass(frozen=True)
class Drawn:
    """One panel as a person sees it."""

    title: str
    text: str
    empty: str | None
    errors: list[str]
    legend: list[str] = field(default_factory=list)
    drawn: bool = False
    rows: int = 0
    marks: dict[str, bool] = field(default_factory=dict)  # title -> whether its colour is in the plot


@dataclass(frozen=True)
class Page:
    """A dashboard as a person sees it: its panels by key, and what is chosen by label."""

    panels: dict[str, Drawn]
    variables: dict[str, str]


def height(board: dict[str, Any]) -> int:
    """Pixels that a dashboard takes with its controls."""
    return 200 + 38 * max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])


def read(browser: webdriver.Chrome) -> Page:
    """What is on the page."""
    found = browser.execute_script(READ)
    return Page({key: Drawn(**panel) for key, panel in found["panels"].items()}, found["variables"])


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """The address of the front end; built first, which takes a minute on a new machine."""
    with frontend.served() as address:
        yield address


@pytest.fixture(scope="module")
def browser(page: str) -> Iterator[webdriver.Chrome]:
    """A window that is high enough for every dashboard."""
    with chromium(1600, max(map(height, BOARDS.values()))) as driver:
        yield driver


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, page: str) -> Iterator[Node]:
    """A run in which everything happens that can be shown, on a node with two GPUs; long enough to have happened."""
    command = [sys.executable, Path(__file__).with_name("eventful_run.py")]
    with node(tmp_path_factory.mktemp("node"), command, gpus=2) as running:
        assert running.driver
        process = f"process 0 {running.training.pid} 3000000000"
        running.driver.order("devices 2", process, "xid 0 79")
        running.prometheus.wait_for('optwatch_steps_total{optimizer="AdamW"} > 150', 120)
        yield running


@pytest.fixture(scope="module")
def drawn(stage: Node, page: str, browser: webdriver.Chrome) -> dict[str, Page]:
    """Every dashboard; the browser's console is silent."""
    found = {}
    for name in BOARDS:
        frontend.draw(browser, page, name, stage.prometheus.url, start="now-1m")
        found[name] = read(browser)
        complaints = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert complaints == [], name
    return found


def _id(value: object) -> str:
    return value["title"] if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_is_there(name: str, drawn: dict[str, Page]) -> None:
    """Each under its title, and no other."""
    expected = {f"panel-{panel['id']}": panel["title"] for board, panel in PANELS if board == name}
    assert {key: panel.title for key, panel in drawn[name].panels.items()} == expected


@pytest.mark.parametrize(("name", "panel"), PANELS, ids=_id)
def test_a_panel_shows_something(name: str, panel: dict[str, Any], drawn: dict[str, Page]) -> None:
    """A line in a colour of its legend, a figure, or rows; or why there are none."""
    found = drawn[name].panels[f"panel-{panel['id']}"]
    assert found.errors == []
    if found.empty is not None:
        assert panel["title"] in EMPTY
        assert found.empty == panel["fieldConfig"]["defaults"]["noValue"]
    elif panel["type"] == "timeseries":
        assert found.legend
        assert all(found.legend)
        assert found.drawn, f"the legend has {found.legend}, the plot no line"
    elif panel["type"] == "stat":
        assert any(character.isdigit() for character in found.text)
        assert "NaN" not in found.text
    else:
        assert panel["type"] == "table"
        assert found.rows > 1, "a heading, and what is below it"


@pytest.mark.parametrize("name", BOARDS)
def test_events_are_marked(name: str, drawn: dict[str, Page]) -> None:
    """Those that happened in this run, across the plots; of several at one moment the last is seen."""
    marked = [panel.marks for panel in drawn[name].panels.values() if panel.marks]
    assert all(any(marks.values()) for marks in marked)
    happened = {mark.partition(",")[0] for marks in marked for mark in marks}
    assert happened >= {"checkpoint", "resume", "skipped steps", "format conversion", "out of memory"}


@pytest.mark.parametrize("name", BOARDS)
def test_variables(name: str, drawn: dict[str, Page]) -> None:
    """Those that are shown, each with what is chosen at first: the run where the dashboard is about one, else all."""
    shown = [one for one in BOARDS[name]["templating"]["list"] if not one.get("hide")]
    chosen = {one["label"]: "All" if one.get("includeAll") else "eventful" for one in shown}
    assert drawn[name].variables == {**chosen, "data source": "Prometheus"}


def test_a_time_without_a_run_is_seen_to_be_empty(stage: Node, page: str, browser: webdriver.Chrome) -> None:
    """What the tests above take for data is not there where there is none."""
    frontend.draw(browser, page, "optimizer", stage.prometheus.url, start="now-2d", end="now-1d")
    found = read(browser).panels
    lines = [found[f"panel-{panel['id']}"] for name, panel in LINES if name == "optimizer"]
    assert all(panel.empty and not panel.drawn and not panel.legend for panel in lines)


def test_a_prometheus_that_is_gone_is_seen(page: str, browser: webdriver.Chrome) -> None:
    """Every panel shows an error."""
    frontend.draw(browser, page, "memory", "http://127.0.0.1:9")
    found = read(browser).panels
    assert found
    assert all(panel.errors for panel in found.values())
    browser.get_log("browser")  # full of the same
