"""Write the recording and alert rules: ``python -m deploy.prometheus.rules [PATH] [--runbooks URL]``."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import yaml

from deploy.prometheus.alerts import ALERTS, Alert
from deploy.prometheus.recordings import RECORDINGS

DEFAULT_PATH = Path("deploy/prometheus/optwatch.rules.yml")

#: Where the pages behind an alert are found.
RUNBOOKS = "docs/runbooks"

_MINUTES = {"s": 1 / 60, "m": 1, "h": 60, "d": 1440}
_DURATION = re.compile(r"(?<=[\[ ])(\d+)([smhd])\b|(?<=\* )60\b")


class _Dumper(yaml.SafeDumper):
    """Writes strings of several lines as blocks, so that a reader sees the expression."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def clocked(text: str, minute: int) -> str:
    """An expression or duration with minutes of so many seconds; windows, offsets and ages alike."""
    if minute == 60:
        return text

    def shorten(found: re.Match[str]) -> str:
        if not found[1]:
            return str(minute)
        seconds = int(found[1]) * _MINUTES[found[2]] * minute
        return f"{seconds:.0f}s" if seconds >= 1 else f"{1000 * seconds:.0f}ms"

    return _DURATION.sub(shorten, f" {text}")[1:]


def _alert(alert: Alert, runbooks: str, minute: int) -> dict[str, object]:
    return {
        "alert": alert.name,
        "expr": clocked(alert.expr, minute),
        "for": clocked(alert.wait, minute),
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": alert.summary,
            "description": alert.description,
            "runbook_url": f"{runbooks.rstrip('/')}/{alert.name}.md",
        },
    }


def generate(runbooks: str = RUNBOOKS, minute: int = 60) -> str:
    """Return the text of the rule file.

    Args:
        runbooks: address below which the runbooks are found.
        minute: seconds that each minute in the rules lasts; tests have no time for long ones.
    """
    # One group: Prometheus evaluates the rules of a group in order, so alerts read what was recorded just before.
    recordings = [{"record": rule.record, "expr": clocked(rule.expr, minute)} for rule in RECORDINGS]
    alerts = [_alert(alert, runbooks, minute) for alert in ALERTS]
    groups = [{"name": "optwatch", "rules": [*recordings, *alerts]}]
    head = "# Made from deploy/prometheus/rules.py by `make generate`; do not edit.\n"
    return head + yaml.dump(
        {"groups": groups}, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True
    )


def main() -> None:
    """Write the rules to the path given on the command line, by default where they are committed."""
    parser = argparse.ArgumentParser("python -m deploy.prometheus.rules", description="Write the rules.")
    parser.add_argument("path", nargs="?", type=Path, default=DEFAULT_PATH)
    parser.add_argument("--runbooks", default=RUNBOOKS, help="address below which you host docs/runbooks")
    parser.add_argument("--minute", type=int, default=60, help="seconds in a minute, for rehearsals")
    options = parser.parse_args()
    if options.minute < 1:
        sys.exit(f"--minute {options.minute}: expected at least 1 second")
    try:
        options.path.write_text(generate(options.runbooks, options.minute), encoding="utf-8")
    except OSError as error:
        sys.exit(f"{options.path}: cannot be written: {error.strerror}")


if __name__ == "__main__":
    main()
