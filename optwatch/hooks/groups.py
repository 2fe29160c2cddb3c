"""Names of tensors, and the few groups that their statistics are shown by.

A group is a label value, so there must be few: by default the blocks of a model in up to four ranges of depth, and
what comes before and after them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

#: Label values for ``group`` by default: these many ranges of blocks, and two more.
RANGES = 4
BEFORE, AFTER, ALL = "before blocks", "after blocks", "all"

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def parameter_names(groups: Sequence[Mapping[str, object]], named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """A name for each parameter of an optimizer, counted through its groups.

    Taken from the model's ``named`` parameters, else from the names the optimizer was given, else made up.
    """
    known = {id(param): name for name, param in named}
    names: list[str] = []
    for group in groups:
        params: Sequence[Tensor] = group["params"]  # type: ignore[assignment]
        own: Sequence[str] = group.get("param_names") or ()  # type: ignore[assignment]
        for position, param in enumerate(params):
            given = own[position] if position < len(own) else f"parameter {len(names)}"
            names.append(known.get(id(param), given))
    return names


def by_depth(names: Sequence[str], ranges: int = RANGES) -> list[str]:
    """The group of each name: ``blocks 0-2`` by the first number in it, or before or after the blocks.

    Models without numbered blocks, or a single one, make one group, ``all``.
    """
    numbers = [int(found.group(1)) if (found := _NUMBER.search(name)) else None for name in names]
    depth = max((number for number in numbers if number is not None), default=-1) + 1
    if depth < 2:
        return [ALL] * len(names)
    first = next(i for i, number in enumerate(numbers) if number is not None)
    return [
        _range(number, depth, min(ranges, depth)) if number is not None else BEFORE if i < first else AFTER
        for i, number in enumerate(numbers)
    ]


def _range(number: int, depth: int, ranges: int) -> str:
    """The range of blocks that ``number`` is in, when ``depth`` blocks are cut into ``ranges`` of equal size."""
    position = number * ranges // depth
    low = -(-position * depth // ranges)
    high = -(-(position + 1) * depth // ranges) - 1
    return f"blocks {low}-{high}" if high > low else f"block {low}"
