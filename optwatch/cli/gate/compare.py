"""Comparing a run with a baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from optwatch.cli.gate.baseline import Baseline

#: Exact, so a change either way is a finding: less state than before may be state that was lost.
_TWO_SIDED = ("state_bytes",)


@dataclass(frozen=True)
class Finding:
    """One value of the baseline, of the run, or of both."""

    name: str
    baseline: float | None
    found: float | None
    tolerance: float

    @property
    def problem(self) -> str | None:
        """What is wrong with it in words; None if nothing is."""
        if self.found is None:
            return "not found in the run"
        if self.baseline is None:
            return "not in the baseline" if self._exact else None
        if self.found != self.found:
            return None if self.baseline != self.baseline else "not a number"
        room = self.tolerance * abs(self.baseline)
        if self.found > self.baseline + room:
            return f"more than {self.tolerance:.1%} above the baseline"
        if self._exact and self.found < self.baseline - room:
            return f"more than {self.tolerance:.1%} below the baseline"
        return None

    @property
    def _exact(self) -> bool:
        return self.name.startswith(_TWO_SIDED)


def compare(baseline: Baseline, values: Mapping[str, float]) -> list[Finding]:
    """A finding for each value that either side has, the baseline's first."""
    return list(_findings(baseline, values))


def _findings(baseline: Baseline, values: Mapping[str, float]) -> Iterator[Finding]:
    for name, value in baseline.values.items():
        yield Finding(name, value, values.get(name), baseline.tolerance(name))
    for name, value in values.items():
        if name not in baseline.values:
            yield Finding(name, None, value, baseline.tolerance(name))
