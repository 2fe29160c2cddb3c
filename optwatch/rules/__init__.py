"""Update rules: one folder each, found by name."""

from __future__ import annotations

from optwatch.rules.adamw.rule import AdamW
from optwatch.rules.base import Rule, Slot

__all__ = ["RULES", "Rule", "Slot"]

#: The update rules by name.
RULES: dict[str, Rule] = {rule.name: rule for rule in (AdamW(),)}
