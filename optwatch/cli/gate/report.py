"""A comparison for people, and for CI systems (JUnit's XML, as they all read it)."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from optwatch.cli.gate.compare import Finding

_UNITS = {"state_bytes": " B/parameter", "peak_memory": " B"}


def table(findings: Sequence[Finding]) -> str:
    """A line for each value, those that fail last, and what that means."""
    rows = [
        (
            "FAIL" if finding.problem else "ok",
            finding.name,
            _number(finding, finding.baseline),
            "->",
            _number(finding, finding.found),
            finding.problem or "",
        )
        for finding in sorted(findings, key=lambda finding: finding.problem is not None)
    ]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(5)]
    lines = ["  ".join([*map(str.ljust, row[:5], widths), row[5]]).rstrip() for row in rows]
    failed = sum(finding.problem is not None for finding in findings)
    said = f"{failed} of {len(findings)} values fail" if failed else f"all {len(findings)} values pass"
    return "\n".join([*lines, said])


def junit(findings: Sequence[Finding], baseline: str, run_id: str) -> str:
    """The comparison as a test suite with a test for each value."""
    failed = sum(finding.problem is not None for finding in findings)
    suites = Element("testsuites")
    suite = SubElement(
        suites, "testsuite", name=f"optwatch check {run_id}", tests=str(len(findings)), failures=str(failed),
        errors="0", skipped="0",
    )  # fmt: skip
    for finding in findings:
        quantity, _, rest = finding.name.partition("/")
        case = SubElement(suite, "testcase", classname=f"optwatch.{quantity}", name=rest or quantity)
        if finding.problem:
            message = f"{finding.name}: {finding.problem}"
            failure = SubElement(case, "failure", message=message)
            failure.text = (
                f"{baseline}: {_number(finding, finding.baseline)}\n{run_id}: {_number(finding, finding.found)}\n"
                f"tolerance: {finding.tolerance:.1%}"
            )
    indent(suites)
    return tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _number(finding: Finding, value: float | None) -> str:
    if value is None:
        return "-"
    quantity = finding.name.split("/")[0]
    text = f"{value:,.0f}" if quantity == "peak_memory" else f"{value:.5g}"
    return text + _UNITS.get(quantity, "")
