"""What the documents say about the dashboards exists: panels, alerts, runbooks, pictures; and who draws these."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from deploy.prometheus.alerts import ALERTS

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

from pictures import FOLDER, PICTURES, RUNS, Picture  # noqa: E402 - the path comes first

BOARDS = {
    path.stem: json.loads(path.read_text("utf-8")) for path in (ROOT / "optwatch/dashboards").glob("*.json")
}
TOUR, GUIDE = (ROOT / "docs" / name for name in ("tour.md", "dashboards.md"))


def titles(kind: str) -> set[str]:
    """Titles of all rows, or of all panels that are none."""
    panels = [panel for board in BOARDS.values() for panel in board["panels"]]
    return {panel["title"] for panel in panels if (panel["type"] == "row") == (kind == "row")}


def images(document: Path) -> set[Path]:
    """The pictures that a document shows."""
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", document.read_text("utf-8"))
    return {(document.parent / name).resolve() for name in shown}


@pytest.mark.parametrize("document", [TOUR, GUIDE], ids=lambda path: path.name)
def test_names_exist(document: Path) -> None:
    """What stands in italics is a panel, a row, a dashboard or an event."""
    marks = {mark["name"] for board in BOARDS.values() for mark in board["annotations"]["list"]}
    known = (
        titles("row") | titles("panel") | marks | {board["title"] for board in BOARDS.values()} | set(BOARDS)
    )
    text = document.read_text("utf-8").replace("**", "")
    named = {" ".join(name.split()) for name in re.findall(r"(?<![\w*])\*([^*]+)\*", text)}
    assert named
    assert named <= known


def test_alerts_and_runbooks_exist() -> None:
    """Of the tour: three incidents, each with an alert and its page."""
    text = TOUR.read_text("utf-8")
    alerts = {name for name in re.findall(r"`(\w+)`", text) if re.fullmatch(r"([A-Z][a-z]+){2,}", name)}
    assert len(alerts) >= 3
    assert alerts <= {alert.name for alert in ALERTS}
    pages = set(re.findall(r"\(runbooks/(\w+)\.md\)", text))
    assert alerts <= pages
    assert all((ROOT / "docs/runbooks" / f"{page}.md").exists() for page in pages)


def test_incidents_can_be_injected() -> None:
    """The commands that the tour gives are those of which the pictures are."""
    injected = set(re.findall(r"--inject (\S+)", TOUR.read_text("utf-8")))
    assert injected == {incident for incident in RUNS.values() if incident}
    assert all(f"`{name}`" in TOUR.read_text("utf-8") for name in RUNS)


@pytest.mark.parametrize("document", [TOUR, GUIDE, ROOT / "README.md"], ids=lambda path: path.name)
def test_it_says_what_drew_its_pictures(document: Path) -> None:
    """No picture is taken for one of a Grafana server."""
    assert images(document)
    assert "Grafana's front-end libraries" in " ".join(document.read_text("utf-8").split())


def test_every_picture_is_there_and_shown() -> None:
    """Each that the command draws, no other, and not too many bytes in a checkout."""
    drawn = {FOLDER / f"{name}.png" for name in PICTURES}
    assert set(FOLDER.glob("*.png")) == drawn
    assert images(TOUR) | images(GUIDE) | images(ROOT / "README.md") == drawn
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 3_000_000


@pytest.mark.parametrize("picture", PICTURES.values(), ids=list(PICTURES))
def test_a_picture_is_of_what_exists(picture: Picture) -> None:
    """Its rows and panels are on its dashboard."""
    panels = BOARDS[picture.dashboard]["panels"]
    assert set(picture.rows) <= {panel["title"] for panel in panels if panel["type"] == "row"}
    assert set(picture.panels) <= {panel["title"] for panel in panels if panel["type"] != "row"}
    assert picture.run in {"", *RUNS}
