"""The regression gate: what a run cost, written down once and compared in CI ever after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from optwatch.cli.gate.baseline import Baseline, GateError, measure, parse_tolerances
from optwatch.cli.gate.compare import compare
from optwatch.cli.gate.report import junit, table
from optwatch.cli.gate.runs import find_run

__all__ = ["Baseline", "GateError", "check_run", "find_run"]


def check_run(
    baseline: Baseline,
    path: Path,
    where: str | None,
    run_id: str | None,
    tolerances: Sequence[str],
    xml: Path | None,
) -> int:
    """Compare, report, and return the exit code. Raises GateError if nothing can be compared."""
    if xml is not None and xml.resolve() == path.resolve():
        raise GateError(f"{xml}: --junit would overwrite the baseline; name another file")
    baseline = replace(baseline, tolerances={**baseline.tolerances, **parse_tolerances(tolerances)})
    page, found = find_run(where, run_id)
    findings = compare(baseline, measure(page, found))
    if xml is not None:
        try:
            xml.write_text(junit(findings, str(path), found), encoding="utf-8")
        except OSError as error:
            raise GateError(f"{xml}: cannot be written: {(error.strerror or 'error').lower()}") from error
    click.echo(f"run {found} against {path}")
    click.echo(table(findings))
    return int(any(finding.problem for finding in findings))
