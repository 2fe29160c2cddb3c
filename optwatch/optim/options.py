"""What the options of a parameter group may be, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

#: Flags of torch.optim's constructors that change how a step runs and cannot be honoured.
UNSUPPORTED = ("differentiable",)
#: Flags that ask for a slot more, of the rules that know them; groups may hold whatever else people put there.
SLOT_FLAGS = ("amsgrad", "centered", "momentum")


class Range(NamedTuple):
    """The values that an option may have, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


#: Which range the options have, by name.
Ranges: TypeAlias = tuple[tuple[str, Range], ...]

AT_LEAST_0 = Range("a number of at least 0", lambda value: value >= 0)
BELOW_1 = Range("a number of [0, 1)", lambda value: 0 <= value < 1)
UP_TO_1 = Range("a number of [0, 1]", lambda value: 0 <= value <= 1)
MORE_THAN_0 = Range("a number greater than 0", lambda value: value > 0)
STEPS = Range("a number of steps, or None", lambda value: value is None or value >= 0)
BETAS = Range("two numbers of [0, 1)", lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value))
BETAS3 = Range(
    "three numbers of [0, 1)", lambda value: len(value) == 3 and all(0 <= beta < 1 for beta in value)
)


def _holds(allowed: Range, value: Any) -> bool:
    try:
        return allowed.holds(value)
    except (TypeError, ValueError, RuntimeError):  # what is no number, or not so many
        return False


def _check_on_device(name: str, value: Tensor, group: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for an option on a device that a step on the host would have to know."""
    if name in SLOT_FLAGS:
        raise ValueError(
            f"{name} is a tensor on {value.device}, but decides which state there is: give a number"
        )
    if not group.get("capturable"):
        raise ValueError(
            f"{name} is a tensor on {value.device}, which each step would have to wait for: keep it on the CPU, or "
            "have it read there with capturable=True"
        )


def check(owner: str, group: Mapping[str, Any], ranges: Ranges, defaults: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for an option of ``group`` that is out of its range or that ``owner`` cannot honour.

    ``defaults`` has all the options that it knows.
    """
    for name, allowed in ranges:
        value = group[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, found shape {tuple(value.shape)}")
        if isinstance(value, Tensor) and value.device.type != "cpu":
            _check_on_device(name, value, group)
        if not _holds(allowed, value):
            raise ValueError(f"{name}={group[name]!r} is out of range: expected {allowed.expected}")
    for name in SLOT_FLAGS:
        if group.get(name) and name not in defaults:
            raise ValueError(f"{name}={group[name]!r}: optwatch.optim.{owner} has no {name}")
    for name in UNSUPPORTED:
        if group.get(name):
            raise ValueError(f"{name}=True is not supported by optwatch.optim.{owner}; leave it False")
