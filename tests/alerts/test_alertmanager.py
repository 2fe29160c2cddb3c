"""The example for Alertmanager: accepted by it, about alerts that exist, inhibiting by labels that both sides have."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from debian import program
from deploy.prometheus import rules
from promql import Labels

FILE = Path(__file__).parents[2] / "deploy" / "alertmanager" / "alertmanager.yml"
CONFIG = yaml.safe_load(FILE.read_text(encoding="utf-8"))
LABELS = Labels({rule.record: rule.labels for rule in rules.RECORDINGS})
ALERTS = {alert.name: alert for alert in rules.ALERTS}


def _named(matchers: list[str]) -> Iterator[str]:
    for matcher in matchers:
        names = re.fullmatch(r'alertname=~?"(.*)"', matcher)
        assert names, matcher
        yield from names[1].split("|")


@pytest.mark.parametrize("rule", CONFIG["inhibit_rules"], ids=lambda rule: rule["source_matchers"][0])
def test_inhibition(rule: dict) -> None:
    """Cause and consequence are alerts of ours, and both have the labels that must be equal.

    Labels that both lack count as equal: the alert of one run would silence those of all.
    """
    for name in (*_named(rule["source_matchers"]), *_named(rule["target_matchers"])):
        labels = LABELS.of(ALERTS[name].expr)
        assert labels is not None
        assert set(rule["equal"]) <= labels, name


def test_every_severity_has_a_route() -> None:
    """What the rules call critical reaches the critical receiver; the rest the one at the root."""
    routed = {route["matchers"][0] for route in CONFIG["route"]["routes"]}
    assert routed == {'severity="critical"'}
    receivers = {receiver["name"] for receiver in CONFIG["receivers"]}
    assert receivers == {alert.severity for alert in rules.ALERTS}


@pytest.mark.integration
@pytest.mark.parametrize(("severity", "receiver"), [("critical", "critical"), ("warning", "warning")])
def test_amtool(severity: str, receiver: str) -> None:
    """Alertmanager's own checker accepts the file, and routes as meant."""
    amtool = program("amtool")
    for command in (
        ["check-config", FILE],
        ["config", "routes", "test", f"--config.file={FILE}", f"severity={severity}"],
    ):
        done = subprocess.run([amtool, *map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == receiver
