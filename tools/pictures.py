"""Draw the dashboards into docs/images: ``make pictures``; eight minutes, of which seven are training.

Four real training runs, three of which break half-way, are watched by an agent that a real Prometheus scrapes; the
pictures are drawn from the dashboards' JSON by Grafana's front-end libraries (tools/frontend), not by a Grafana server.
A minute of the alert rules lasts four seconds here, so that they fire within the few minutes of a picture.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT)]
os.environ["PATH"] += os.pathsep + str(ROOT / ".tools" / "usr" / "bin")

from selenium import webdriver  # noqa: E402 - the paths come first
from selenium.webdriver.common.by import By  # noqa: E402

import frontend  # noqa: E402
from browser import chromium  # noqa: E402
from deploy.prometheus import rules  # noqa: E402
from node import demo, node  # noqa: E402

FOLDER = ROOT / "docs" / "images"
SECONDS = 420
MINUTE = 4  # seconds

#: Name of a run -> what breaks it half-way.
RUNS = {"healthy": "", "promoted": "fp32-resume", "poisoned": "nan-loss", "leaking": "leak"}


class Picture(NamedTuple):
    """Some rows of a dashboard, or some of its panels, for one of the runs (or all that are not ``healthy``)."""

    dashboard: str
    run: str = ""
    rows: tuple[str, ...] = ()
    panels: tuple[str, ...] = ()


#: Name of the file, without suffix. Rows about GPUs are left out: these runs have none.
PICTURES = {
    "optimizer": Picture("optimizer", "healthy", ("Overview", "Step health")),
    "optimizer-state": Picture("optimizer", "healthy", ("Gradients", "Updates", "Optimizer state")),
    "memory": Picture("memory", "healthy", ("Optimizer state", "What the run holds")),
    "fleet": Picture("fleet", rows=("Runs", "Ranks")),
    "monitor": Picture("monitor"),
    "tour-alerts": Picture("fleet", panels=("Ranks of all runs by state", "Alerts")),
    "tour-promoted-fleet": Picture(
        "fleet", panels=("State found minus asked for, by run", "State a parameter by run")
    ),
    "tour-promoted-overview": Picture("optimizer", "promoted", ("Overview",)),
    "tour-promoted-memory": Picture(
        "memory", "promoted", panels=("State found against asked for", "State by slot and dtype")
    ),
    "tour-poisoned-overview": Picture("optimizer", "poisoned", ("Overview",)),
    "tour-poisoned-gradients": Picture(
        "optimizer", "poisoned", panels=("Gradient norm", "Non-finite gradient elements a second")
    ),
    "tour-poisoned-before": Picture("optimizer", "poisoned", panels=("Loss by rank", "Learning rate")),
    "tour-leaking-memory": Picture("memory", "leaking", ("What the run holds",)),
    "tour-leaking-state": Picture("memory", "leaking", ("Optimizer state",)),
}


def train() -> None:
    """Start all runs, and wait for them."""
    runs = []
    for name, incident in RUNS.items():
        # One text a step, for more steps: all of them share the machine.
        inject = [f"--inject={incident}"] if incident else []
        environment = {**os.environ, "OPTWATCH_RUN_ID": name}
        runs.append(subprocess.Popen(demo(SECONDS, "--batch=1", *inject), env=environment))
    for run in runs:
        run.wait()


@contextmanager
def stage(root: Path) -> Iterator[str]:
    """The address of a Prometheus that has seen the runs all but end."""
    file = root / "optwatch.rules.yml"
    file.write_text(rules.generate(minute=MINUTE), encoding="utf-8")
    with node(root / "node", [sys.executable, __file__, "train"], rules=[file]) as running:
        time.sleep(SECONDS - 40)  # the first steps are taken
        yield running.prometheus.url


def shoot(browser: webdriver.Chrome, address: str, prometheus: str, name: str, end: float) -> None:
    """Draw one picture into its file."""
    picture = PICTURES[name]
    chosen = {"run": picture.run} if picture.run else {}
    frontend.draw(
        browser, address, picture.dashboard, prometheus,
        start=f"{(end - SECONDS) * 1000:.0f}", end=f"{end * 1000:.0f}", scrape="5s",
        rows=picture.rows, panels=picture.panels, chosen=chosen,
    )  # fmt: skip
    path = FOLDER / f"{name}.png"
    browser.find_element(By.ID, "root").screenshot(str(path))
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e3:.0f} kB")


def draw(prometheus: str, end: float, names: list[str]) -> None:
    """Draw these pictures of the runs that end at that time (Unix seconds)."""
    with frontend.served() as address, chromium(1400, 4200) as browser:
        for name in names:
            shoot(browser, address, prometheus, name, end)


def main() -> None:
    """Train, and draw all pictures, or those that the command line names."""
    names = sys.argv[1:] or list(PICTURES)
    if names == ["train"]:
        train()
        return
    frontend.build()  # before the runs, whose time it would take
    with tempfile.TemporaryDirectory() as root, stage(Path(root)) as prometheus:
        draw(prometheus, time.time(), names)


if __name__ == "__main__":
    main()
