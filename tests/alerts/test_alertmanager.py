"""The example for Alertmanager: accepted by it, about alerts that exist, inhibiting by labels that both sides have."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from agent_process import eventually
from alertmanager_server import alertmanager
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


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Alertmanager with the shipped inhibition rules."""
    with alertmanager(tmp_path_factory.mktemp("alertmanager") / "home") as (url, _):
        yield url


@pytest.mark.integration
@pytest.mark.parametrize("number", range(len(CONFIG["inhibit_rules"])))
def test_a_cause_silences_its_consequences_and_nothing_else(number: int, address: str) -> None:
    """In Alertmanager itself: within the same run or GPU, not in another one."""
    rule = CONFIG["inhibit_rules"][number]
    (cause,) = _named(rule["source_matchers"])
    consequences = list(_named(rule["target_matchers"]))
    # Each consequence in the same place, and once more in one of its own.
    here, *there = (
        {label: f"{label} {number} {place}" for label in rule["equal"]} for place in ("here", *consequences)
    )
    _post(address, [{"alertname": cause, **here}])
    _post(address, [{"alertname": name, **here} for name in consequences])
    _post(address, [{"alertname": name, **labels} for name, labels in zip(consequences, there, strict=True)])

    def check() -> None:
        states = {tuple(sorted(one["labels"].items())): one["status"]["state"] for one in _active(address)}

        def state(name: str, labels: dict[str, str]) -> str | None:
            return states.get(tuple(sorted({"alertname": name, **labels}.items())))

        assert state(cause, here) == "active"
        for name, elsewhere in zip(consequences, there, strict=True):
            assert (name, state(name, here)) == (name, "suppressed")
            assert (name, state(name, elsewhere)) == (name, "active")

    eventually(check)


def _post(address: str, alerts: list[dict[str, str]]) -> None:
    body = json.dumps([{"labels": labels} for labels in alerts]).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{address}/api/v2/alerts", body, headers), timeout=10
    ) as done:
        assert done.status == 200


def _active(address: str) -> list[dict]:
    with urllib.request.urlopen(f"{address}/api/v2/alerts", timeout=10) as answer:
        return json.load(answer)


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
