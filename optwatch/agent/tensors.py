"""Which tensors are the worst: JSON, since their names as labels would make new series with every change of rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from optwatch.agent.rank import Rank
from optwatch.board import TensorInfo
from optwatch.metrics.catalogue import CATALOGUE

#: What tensors are ordered by.
METRICS = tuple(
    CATALOGUE[f"optwatch.{name}.ratio"]
    for name in ("update_quantization_error", "quantization_error", "update_to_parameter")
)
_DEFAULT, _MOST = 10, 100
_PARAMETERS = {"k", "run_id", "rank"}


def count_of(query: Mapping[str, str]) -> int:
    """How many tensors a request asks for. Raises ValueError with a line for the client."""
    unknown = query.keys() - _PARAMETERS
    if unknown:
        raise ValueError(f"{min(unknown)!r} is no parameter; known: {', '.join(sorted(_PARAMETERS))}")
    text = query.get("k", str(_DEFAULT))
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= _MOST):
        raise ValueError(f"k={text[:20]!r}: expected a number of 1 to {_MOST}")
    return int(text)


def largest(ranks: Iterable[Rank], query: Mapping[str, str], count: int) -> list[dict[str, Any]]:
    """For each rank, optimizer and metric the tensors with the largest values, from the newest full statistics.

    A value that is not finite is the worst and written as text: ``"NaN"``, ``"+Inf"``.
    """
    wanted = {name: value for name, value in query.items() if name != "k"}
    return [
        {
            **rank.labels,
            "optimizer": optimizer,
            "metric": spec.prometheus,
            "tensors": [_entry(*one) for one in found],
        }
        for rank in ranks
        if wanted.items() <= rank.labels.items()
        for spec in METRICS
        for optimizer, found in rank.worst(spec, count)
    ]


def _entry(tensor: TensorInfo, slot: str, value: float) -> dict[str, Any]:
    own = {"slot": slot} if slot else {}
    return {"tensor": tensor.name, "group": tensor.group, **own, "value": _json(value)}


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else {math.inf: "+Inf"}.get(value, "NaN")
