"""Chromium without a window, for tests and for pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from selenium import webdriver

from debian import program

SWITCHES = (
    "--headless",
    "--no-sandbox",  # this user may be root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
)


@contextmanager
def chromium(width: int = 1400, height: int = 1600) -> Iterator[webdriver.Chrome]:
    """A browser with a window of that size, in CSS pixels."""
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium")
    for switch in (*SWITCHES, f"--window-size={width},{height}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(program("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()
