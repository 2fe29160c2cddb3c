"""The rule file: up to date, accepted by Prometheus, and about series and labels that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from debian import program
from deploy.prometheus import rules
from promql import Labels

ROOT = Path(__file__).parents[2]
FILE = ROOT / rules.DEFAULT_PATH
LABELS = Labels({rule.record: rule.labels for rule in rules.RECORDINGS})


def test_is_up_to_date() -> None:
    """The committed file is what the generator writes."""
    assert FILE.read_text(encoding="utf-8") == rules.generate(), "run `make generate` and commit the result"


def test_names_are_unique() -> None:
    """One alert, one page: two alerts of a name could not be told apart."""
    names = [alert.name for alert in rules.ALERTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("rule", rules.RECORDINGS, ids=lambda rule: rule.record)
def test_recording_keeps_the_labels_of_its_name(rule: rules.Recording) -> None:
    """A recorded series has exactly the labels that it declares, and its name begins with them."""
    found = LABELS.of(rule.expr)
    assert found == frozenset(rule.labels)
    level = rule.record.split(":")[0]
    assert level == "_".join(label.removesuffix("_id") for label in rule.labels)


@pytest.mark.parametrize("alert", rules.ALERTS, ids=lambda alert: alert.name)
def test_alert_reads_and_shows_labels_that_exist(alert: rules.Alert) -> None:
    """Every series, matcher and `by` label is published; so is every label that a text shows."""
    found = LABELS.of(alert.expr)
    shown = set(re.findall(r"\$labels\.(\w+)", alert.summary + alert.description))
    assert found is not None
    assert shown <= found, f"the text shows {sorted(shown - found)}, which the alert does not have"


@pytest.mark.parametrize("alert", rules.ALERTS, ids=lambda alert: alert.name)
def test_alert_has_a_runbook(alert: rules.Alert) -> None:
    """The page exists and says what it means, what to look at and what to do."""
    page = (ROOT / "docs" / "runbooks" / f"{alert.name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {alert.name}\n")
    for heading in ("## Look at", "## Do"):
        assert "\n- " in page.split(heading)[1]


def test_no_runbook_without_an_alert() -> None:
    """A page that no alert leads to is out of date."""
    pages = {page.stem for page in (ROOT / "docs" / "runbooks").glob("*.md")}
    assert pages == {alert.name for alert in rules.ALERTS}


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
