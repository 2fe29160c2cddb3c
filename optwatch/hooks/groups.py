"""Names of tensors, and the few groups that their statistics are shown by.

A group is a label value, so there must be few: by default the blocks of a model in up to four ranges of depth, and
what comes before and after them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

#: Label values for ``group`` by default: these many ranges of blocks, and two more.
RANGES = 4
BEFORE, AFTER, ALL = "before blocks", "after blocks", "all"
#: Groups of a pattern or a function at most; the tensors of further ones share the last, ``OTHER``. Each group makes
#: about twenty series of a rank's three hundred.
MAXIMUM_GROUPS = 24
OTHER = "other"

#: How tensors are grouped: a regular expression, or a function of the name. None = by depth.
GroupBy: TypeAlias = "str | re.Pattern[str] | Callable[[str], str] | None"
#: Names -> the group of each.
Grouping: TypeAlias = Callable[[Sequence[str]], "list[str]"]

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


def grouping(by: GroupBy) -> Grouping:
    """The grouping that was asked for. Raises ValueError for a pattern that is none, TypeError for anything else.

    A pattern is searched in each name: what it matches is the group, or what its groups match, joined by a space. Names
    without a match are in ``OTHER``.
    """
    if by is None:
        return by_depth
    if isinstance(by, str):
        try:
            by = re.compile(by)
        except re.error as error:
            raise ValueError(f"groups={by!r}: expected a regular expression: {error}") from error
    if isinstance(by, re.Pattern):
        return lambda names: _bounded([_matched(by, name) for name in names])
    if callable(by):
        return lambda names: _bounded([str(by(name)) for name in names])
    raise TypeError(f"groups={by!r}: expected a regular expression or a function of a tensor's name")


def _matched(pattern: re.Pattern[str], name: str) -> str:
    found = pattern.search(name)
    if found is None:
        return OTHER
    return " ".join(part for part in found.groups() if part) or found.group()


def _bounded(groups: list[str]) -> list[str]:
    """At most `MAXIMUM_GROUPS`, in the order in which they come; the empty name is no group."""
    named = [group or OTHER for group in groups]
    different = dict.fromkeys(group for group in named if group != OTHER)
    kept = set(list(different)[: MAXIMUM_GROUPS - 1]) if len(different) >= MAXIMUM_GROUPS else set(different)
    return [group if group in kept else OTHER for group in named]


def _range(number: int, depth: int, ranges: int) -> str:
    """The range of blocks that ``number`` is in, when ``depth`` blocks are cut into ``ranges`` of equal size."""
    position = number * ranges // depth
    low = -(-position * depth // ranges)
    high = -(-(position + 1) * depth // ranges) - 1
    return f"blocks {low}-{high}" if high > low else f"block {low}"
