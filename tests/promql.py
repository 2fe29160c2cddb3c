"""Reading PromQL: which labels an expression's result has, checked against the catalogue on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import promql_parser

from optwatch.metrics.catalogue import CATALOGUE

#: Labels that Prometheus adds to everything it scrapes.
TARGET = frozenset({"instance", "job"})
#: Labels that every alert has in the series that Prometheus itself makes.
ALERT = frozenset({"alertname", "alertstate", "severity", "run_id"})  # most are about a run
SETS = frozenset({"and", "or", "unless"})


def selectors(expr: Any) -> Iterator[Any]:
    """Every selector below an expression."""
    found: list[Any] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        elif isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)
        return True

    promql_parser.walk(expr, visit)
    yield from found


class Labels:
    """Works out the labels of an expression; fails on a series or label that nothing publishes.

    ``recorded``: labels by name of the series that recording rules make.
    """

    def __init__(self, recorded: Mapping[str, tuple[str, ...]] | None = None) -> None:
        self.recorded = recorded or {}

    def of(self, text: str) -> frozenset[str] | None:
        """The labels of the result of ``text``; None for a scalar."""
        return self._labels(promql_parser.parse(text))

    def _labels(self, node: Any) -> frozenset[str] | None:
        return getattr(self, f"_{type(node).__name__}")(node)

    def _NumberLiteral(self, node: Any) -> None:  # noqa: N802 - named after the parser's classes
        return None

    _StringLiteral = _NumberLiteral

    def _VectorSelector(self, node: Any) -> frozenset[str]:  # noqa: N802
        labels = self._series(node.name)
        for matcher in node.matchers.matchers:
            assert matcher.name in labels, f"{node.name} has no label {matcher.name}, only {sorted(labels)}"
        return labels

    def _series(self, name: str) -> frozenset[str]:
        if name == "up":
            return TARGET
        if name == "ALERTS":
            return ALERT
        if name in self.recorded:
            return frozenset(self.recorded[name])
        spec = CATALOGUE.sample(name)
        assert spec is not None, f"nothing publishes {name}"
        assert name in spec.samples, f"{name} is a histogram: take its _bucket, _sum or _count"
        return frozenset(spec.labels) | TARGET | ({"le"} if name.endswith("_bucket") else set())

    def _MatrixSelector(self, node: Any) -> frozenset[str]:  # noqa: N802
        return self._VectorSelector(node.vector_selector)

    def _ParenExpr(self, node: Any) -> frozenset[str] | None:  # noqa: N802
        return self._labels(node.expr)

    _UnaryExpr = _SubqueryExpr = _ParenExpr

    def _Call(self, node: Any) -> frozenset[str] | None:  # noqa: N802
        vectors = [labels for labels in map(self._labels, node.args) if labels is not None]
        if not vectors:
            return None
        if node.func.name == "histogram_quantile":
            assert "le" in vectors[0], "histogram_quantile needs the label le"
            return vectors[0] - {"le"}
        return vectors[0]

    def _AggregateExpr(self, node: Any) -> frozenset[str]:  # noqa: N802
        inner = self._labels(node.expr)
        assert inner is not None
        if node.modifier is None:
            return frozenset()
        kept = frozenset(node.modifier.labels)
        assert node.modifier.type == promql_parser.AggModifierType.By, "name the labels that stay, with `by`"
        assert kept <= inner, f"by {sorted(kept - inner)}: not among the labels {sorted(inner)}"
        return kept

    def _BinaryExpr(self, node: Any) -> frozenset[str] | None:  # noqa: N802
        left, right = self._labels(node.lhs), self._labels(node.rhs)
        if left is None or right is None:
            return right if left is None else left
        matching = node.modifier.matching if node.modifier else None
        operator = str(node.op)
        if matching is not None:
            shared = frozenset(matching.labels)
            assert shared <= left, f"on {sorted(shared - left)}: not on the left of {operator}"
            assert shared <= right, f"on {sorted(shared - right)}: not on the right of {operator}"
            if operator not in SETS:
                brought = frozenset(node.modifier.group_labels or ())
                assert brought <= right, f"group_left {sorted(brought - right)}: not on the right"
                return left | brought
        elif operator != "or":
            # Two sides with different labels never match: the expression would silently be empty.
            assert left == right, f"{operator}: {sorted(left)} never match {sorted(right)}; say on (...)"
        return left | right if operator == "or" else left
