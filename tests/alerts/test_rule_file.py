"""The rule file: up to date, accepted by Prometheus, and about series and labels that exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from debian import program
from deploy.prometheus import rules
from deploy.prometheus.alerts import Alert
from deploy.prometheus.recordings import Recording
from optwatch.cli.app import cli
from optwatch.metrics.catalogue import CATALOGUE
from promql import Labels

ROOT = Path(__file__).parents[2]
FILE = ROOT / rules.DEFAULT_PATH
LABELS = Labels({rule.record: rule.labels for rule in rules.RECORDINGS})
BOARDS = [
    json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "optwatch/dashboards").glob("*.json")
]
#: Titles of panels and names of annotations, which pages write in italics.
SHOWN = {panel["title"] for board in BOARDS for panel in board["panels"]}
SHOWN |= {mark["name"] for board in BOARDS for mark in board["annotations"]["list"]}

every_alert = pytest.mark.parametrize("alert", rules.ALERTS, ids=lambda alert: alert.name)


def _page(alert: Alert) -> str:
    return (ROOT / "docs" / "runbooks" / f"{alert.name}.md").read_text(encoding="utf-8")


def test_is_up_to_date() -> None:
    """The committed file is what the generator writes."""
    assert FILE.read_text(encoding="utf-8") == rules.generate(), "run `make generate` and commit the result"


def test_names_are_unique() -> None:
    """One alert, one page: two alerts of a name could not be told apart."""
    names = [alert.name for alert in rules.ALERTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("rule", rules.RECORDINGS, ids=lambda rule: rule.record)
def test_recording_keeps_the_labels_of_its_name(rule: Recording) -> None:
    """A recorded series has exactly the labels that it declares, and its name begins with them."""
    found = LABELS.of(rule.expr)
    assert found == frozenset(rule.labels)
    level = rule.record.split(":")[0]
    assert level == "_".join(label.removesuffix("_id") for label in rule.labels)


@every_alert
def test_alert_reads_and_shows_labels_that_exist(alert: Alert) -> None:
    """Every series, matcher and `by` label is published; so is every label that a text shows."""
    found = LABELS.of(alert.expr)
    shown = set(re.findall(r"\$labels\.(\w+)", alert.summary + alert.description))
    assert found is not None
    assert shown <= found, f"the text shows {sorted(shown - found)}, which the alert does not have"


@every_alert
def test_alert_has_a_runbook(alert: Alert) -> None:
    """The page says what it means and does, how to confirm it, why it happens, most likely first, and what to do."""
    page = _page(alert)
    assert page.startswith(f"# {alert.name}\n")
    parts = re.split(r"^## (.*)$", page, flags=re.MULTILINE)
    assert parts[1::2] == ["Impact", "Confirm", "Causes", "Do"]
    assert all(part.strip() for part in parts[2::2])
    assert "\n1. " in parts[6]
    assert "\n- " in parts[8]


@every_alert
def test_runbook_is_about_things_that_exist(alert: Alert) -> None:
    """Its PromQL reads series and labels that are published; its panels, alerts and commands are ours."""
    page = _page(alert)
    queries = re.findall(r"^    (.+)$", page, flags=re.MULTILINE)
    assert queries, "no PromQL"
    for query in queries:
        assert LABELS.of(query) is not None
    for name in re.findall(r"`(optwatch_\w+)`", page):
        assert CATALOGUE.sample(name), name
    commands = re.findall(r"`optwatch (\w+)([^`]*)`", page)
    assert commands
    for command, options in commands:
        known = {option for parameter in cli.commands[command].params for option in parameter.opts}
        assert set(options.split()) <= known, f"optwatch {command}{options}"
    assert set(re.findall(r"(?<!\*)\*(?!smaller|stored)([^*\n]+)\*", page)) <= SHOWN
    words = set(re.findall(r"\b[A-Z][a-z]+(?:[A-Z][a-z]+)+\b", page))
    assert words <= {one.name for one in rules.ALERTS}


def test_every_threshold_is_explained() -> None:
    """docs/alerts.md has a row for each alert."""
    rows = re.findall(
        r"^\| ([A-Z][A-Za-z, ]+) \|", (ROOT / "docs/alerts.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(", ".join(rows).split(", ")) == sorted(alert.name for alert in rules.ALERTS)


def test_no_runbook_without_an_alert() -> None:
    """A page that no alert leads to is out of date."""
    pages = {page.stem for page in (ROOT / "docs" / "runbooks").glob("*.md")}
    assert pages == {alert.name for alert in rules.ALERTS}


def test_runbooks_can_lie_elsewhere() -> None:
    """Every link of a rule file begins with the address that was given."""
    made = yaml.safe_load(rules.generate("https://wiki.example/optwatch/"))
    links = [rule["annotations"]["runbook_url"] for rule in made["groups"][0]["rules"] if "alert" in rule]
    assert links == [f"https://wiki.example/optwatch/{alert.name}.md" for alert in rules.ALERTS]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere/rules.yml"], "nowhere/rules.yml: cannot be written: No such file or directory"),
        (["rules.yml", "--minute=0"], "--minute 0: expected at least 1 second"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    """What was given, and what is wrong with it; the exit code tells, too."""
    command = [sys.executable, "-m", "deploy.prometheus.rules", *arguments]
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=paths, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", complaint + "\n")


@pytest.mark.integration
def test_a_broken_rule_file_is_refused(tmp_path: Path) -> None:
    """By the check that the README names, and by Prometheus before it starts: they say which rule it is."""
    broken = tmp_path / FILE.name
    broken.write_text(
        FILE.read_text(encoding="utf-8").replace("sum by (run_id", "sum of (run_id", 1), encoding="utf-8"
    )
    shutil.copy(FILE.with_name("prometheus.yml"), tmp_path)
    config = tmp_path / "prometheus.yml"
    checks = (["promtool", "check", "rules", broken], ["promtool", "check", "config", config])
    start = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    for name, *arguments in (
        *checks,
        [*start, "--web.listen-address=127.0.0.1:0", "--web.external-url=http://x"],
    ):
        command = [program(name), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode
        said = done.stdout + done.stderr
        assert f"{FILE.name}: 6:11: group" in said, said
        assert "could not parse expression" in said


@pytest.mark.integration
def test_promtool_accepts_the_rules() -> None:
    """Prometheus' own checker finds nothing to complain about, lint included."""
    check = [program("promtool"), "check", "rules", "--lint=all", "--lint-fatal", str(FILE)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.integration
def test_promtool_accepts_the_example_configuration() -> None:
    """The example loads as it is, with the rule file beside it."""
    check = [program("promtool"), "check", "config", str(FILE.parent / "prometheus.yml")]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
