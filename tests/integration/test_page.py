"""The live page and the report in a real browser: what a person sees, chooses and reaches with the keyboard."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

import agent_process
import board_samples
from browser import chromium
from optwatch.cli.scrape import fetch
from optwatch.cli.snapshot import Tracker
from optwatch.exporters.store import RunFile, curves
from optwatch.pages import report_page

pytestmark = pytest.mark.integration

WAIT = 30  # seconds for the page to follow, on a machine with other things to do


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """Chromium without a window."""
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An agent that serves two ranks which take a step every twentieth of a second."""
    directory = tmp_path_factory.mktemp("boards")
    ranks = [board_samples.start_writer(directory, "the-run", rank, 20.0) for rank in (0, 1)]
    try:
        with agent_process.agent(directory) as (url, _):
            yield url.removesuffix("metrics")
    finally:
        for rank in ranks:
            board_samples.end(rank)


@pytest.fixture(scope="module")
def live(browser: webdriver.Chrome, address: str) -> webdriver.Chrome:
    """The live page, with curves."""
    browser.get(address)
    wait(browser).until(lambda page: "the-run" in page.find_element(By.ID, "run").text)
    wait(browser).until(lambda page: page.find_elements(By.CSS_SELECTOR, "figure canvas"))
    return browser


def wait(browser: webdriver.Chrome) -> WebDriverWait:
    return WebDriverWait(browser, WAIT, poll_frequency=0.2)


def figure(browser: webdriver.Chrome, metric: str):
    """The plot of a metric, scrolled to, so that it is drawn."""
    found = browser.find_element(By.CSS_SELECTOR, f"figure[data-metric='{metric}']")
    browser.execute_script("arguments[0].scrollIntoView()", found)
    wait(browser).until(lambda _: found.find_elements(By.TAG_NAME, "canvas"))
    return found


def keys(found) -> list[str]:
    """The lines of a plot's key: name and value; read at once, since the page renews them."""
    script = "return [...arguments[0].querySelectorAll('.keys li')].map(item => item.textContent)"
    return found.parent.execute_script(script, found)


def complaints(browser: webdriver.Chrome) -> list[str]:
    """What the browser's console has to say."""
    return [entry["message"] for entry in browser.get_log("browser")]


def cards(browser: webdriver.Chrome) -> dict[str, str]:
    """The figures at the head of the page."""
    texts = "card => [...card.children].map(part => part.textContent)"
    script = f"return [...document.querySelectorAll('#cards div')].map({texts})"
    return dict(browser.execute_script(script))


def test_it_follows_the_run(live: webdriver.Chrome) -> None:
    """The step goes on by itself, the state is told, and the console is silent."""
    first = float(cards(live)["Step"])
    wait(live).until(lambda page: float(cards(page)["Step"]) > first)
    assert live.find_element(By.ID, "state").text == "running"
    assert complaints(live) == []


def rows(browser: webdriver.Chrome, table: str) -> list[list[str]]:
    """The cells of a table, read at once."""
    script = (
        "return [...document.querySelectorAll(arguments[0])].map(r => [...r.cells].map(c => c.textContent))"
    )
    found: list[list[str]] = browser.execute_script(script, f"#{table} tr")
    return found


def test_it_shows_what_the_terminal_view_shows(live: webdriver.Chrome, address: str) -> None:
    """Every slot with its bytes, found and asked for, and every group with its norms and errors."""
    wait(live).until(lambda page: rows(page, "groups-now"))
    view = Tracker().update(fetch(f"{address}metrics")).runs[0]
    head, *slots = rows(live, "state-now")
    assert head == ["", "stored as", "bytes", "asked for", "in fp32", "saved", "error"]
    assert [row[0] for row in slots] == [slot.slot for slot in view.slots]
    assert {row[1] for row in slots} == {"int8"}
    head, *groups = rows(live, "groups-now")
    assert head == ["", "gradient", "exp_avg", "exp_avg_sq", "update / weight", "update error"]
    assert [row[0] for row in groups] == [group.group for group in view.groups]
    # All sums of a step are its number, so these do not change while they are compared.
    assert {row[5] for row in groups} == {"100 %"}
    assert {group.update_error for group in view.groups} == {1.0}
    assert set(cards(live)) >= {"Step", "Loss", "Optimizer state", "Host memory", "Watching, of the time"}


def test_it_asks_nobody_else(live: webdriver.Chrome, address: str) -> None:
    """Every request of the page goes to the agent that served it."""
    asked = live.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert asked
    assert all(name.startswith((address, "data:")) for name in asked)


def choose(browser: webdriver.Chrome, **choices: str) -> None:
    """Set the selections at the head of the page."""
    for name, value in choices.items():
        Select(browser.find_element(By.ID, name)).select_by_value(value)


def test_ranks_and_groups_can_be_chosen(live: webdriver.Chrome) -> None:
    """With all ranks there is a line for each, with one only its own."""
    found = figure(live, "optwatch.gradient.norm")
    choose(live, group="blocks_0", rank="")
    wait(live).until(lambda _: [key.split()[0] for key in keys(found)] == ["0", "1"])
    choose(live, rank="1")
    wait(live).until(lambda _: len(keys(found)) == 1)


def test_the_keyboard_moves_through_time(live: webdriver.Chrome) -> None:
    """Left from the end of a plot: the key shows an earlier value."""
    found = figure(live, "optwatch.gradient.norm")
    choose(live, group="blocks_0", rank="0")
    wait(live).until(lambda _: len(keys(found)) == 1)
    plot = found.find_element(By.CSS_SELECTOR, ".plot")

    def earlier(_: object) -> bool:
        newest = float(keys(found)[0].split()[-1])
        for _ in range(3):
            plot.send_keys(Keys.ARROW_LEFT)
        return float(keys(found)[0].split()[-1]) < newest

    wait(live).until(earlier)  # there must be a history first
    choose(live, rank="", group="")


@pytest.mark.parametrize(("theme", "lightness"), [("dark", range(60)), ("light", range(200, 256))])
def test_light_and_dark(live: webdriver.Chrome, theme: str, lightness: range) -> None:
    """The page and its text change, whatever the system says."""
    Select(live.find_element(By.ID, "theme")).select_by_value(theme)
    color = live.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    channels = [int(float(part)) for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    assert all(channel in lightness for channel in channels)


def test_an_agent_that_is_gone_is_told(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """Old values are not shown as new ones."""
    rank = board_samples.start_writer(tmp_path, "short", 0, 20.0)
    try:
        with agent_process.agent(tmp_path) as (url, _):
            browser.get(url.removesuffix("metrics"))
            wait(browser).until(lambda page: page.find_element(By.ID, "state").text == "running")
        wait(browser).until(lambda page: "values are old" in page.find_element(By.ID, "state").text)
    finally:
        board_samples.end(rank)


def test_the_report(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """From a file: the same plots, without a word to anybody; names that look like markup are text."""
    with closing(RunFile(None)) as run:
        for i in range(50):
            for name in ("optwatch.loss", "optwatch.step"):
                run.add(1.7e9 + i, [((name, (("rank", "</script><b>0"),)), 5.0 - i / 10)])
        path = tmp_path / "report.html"
        path.write_bytes(report_page("</title><b>run", {}, curves(run)))
    browser.get_log("browser")
    browser.get(path.as_uri())
    assert keys(figure(browser, "optwatch.loss")) == [" 0.1"]
    assert browser.find_element(By.ID, "run").text == "</title><b>run"
    assert browser.find_elements(By.TAG_NAME, "b") == []
    assert complaints(browser) == []


def test_what_holds_now_is_told_from_history(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """A format that is no longer used counts no more, NaN is shown as such, a counter keeps what it counted."""

    def state(dtype: str) -> tuple[str, tuple[tuple[str, str], ...]]:
        labels = {"optimizer": "AdamW", "slot": "exp_avg", "dtype": dtype, "device": "cpu", "rank": "0"}
        return "optwatch.optimizer.state", tuple(labels.items())

    rank = (("rank", "0"),)
    asked = "optwatch.optimizer.state_expected", state("int8")[1]
    with closing(RunFile(None)) as run:
        for i in range(60):
            held = state("int8"), 1000.0
            if i >= 30:
                held = state("float32"), 4000.0
            run.add(
                1.7e9 + i,
                [
                    held,
                    (asked, 1000.0),
                    (("optwatch.loss", rank), 1.0 if i < 59 else math.nan),
                    (("optwatch.nonfinite_elements", rank), 7.0 if i > 5 else 0.0),
                ],
            )
        path = tmp_path / "report.html"
        path.write_bytes(report_page("run", {}, curves(run)))
    browser.get(path.as_uri())
    found = cards(browser)
    assert found["Optimizer state"] == "4 kB, 1 kB asked for"
    assert found["Loss"] == "NaN"
    assert found["Non-finite gradients"] == "7"
    assert rows(browser, "state-now")[1][:4] == ["exp_avg", "fp32", "4 kB", "1 kB"]
    assert len(browser.find_elements(By.CSS_SELECTOR, "#state-now tr.bad, #cards .bad")) == 4
    assert keys(figure(browser, "optwatch.loss")) == [" NaN"]
    assert (
        browser.find_elements(By.CSS_SELECTOR, "#Devices:not([hidden]), a[href='#Devices']:not([hidden])")
        == []
    )
    assert complaints(browser) == []
