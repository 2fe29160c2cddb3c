"""Assertions about optimizers, for your own tests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch

from optwatch.optim import Optimizer
from optwatch.optim.count import count_bytes, state_leaves

__all__ = ["assert_state_bytes"]

_SHOWN = 5  # parameters that the message names


class _Held(NamedTuple):
    """The state of one parameter."""

    name: str
    elements: int
    size: int  # bytes
    kinds: str

    @property
    def per_element(self) -> float:
        return self.size / max(self.elements, 1)


def assert_state_bytes(
    optimizer: torch.optim.Optimizer,
    max_per_parameter: float | None = None,
    *,
    model: torch.nn.Module | None = None,
) -> None:
    """Assert that an optimizer's state takes at most so many bytes for each parameter (element) that has state.

    Call it after a step, and again after a resume. Bytes are those of the storages, each counted once, step counters
    left out. Without ``max_per_parameter`` one of optwatch's optimizers is held to the bytes that its ``state=`` asks
    for, exactly. ``model`` gives the parameters their names in the message.

    Raises:
        AssertionError: it takes more; the message names the slots with their storage types, and the parameters.
        ValueError: there is nothing to hold it to: no step was taken, or no limit is known.
    """
    held = list(_held(optimizer, model))
    elements = sum(one.elements for one in held)
    if not elements:
        raise ValueError(
            f"{type(optimizer).__name__} has no state yet: take a step before asserting its bytes"
        )
    if max_per_parameter is None:
        _assert_as_asked_for(optimizer)
        return
    slots = _by_slot(optimizer)
    total = sum(slots.values()) / elements
    if total <= max_per_parameter:
        return
    over = sorted(
        (one for one in held if one.per_element > max_per_parameter), key=lambda one: one.size, reverse=True
    )
    name = type(optimizer).__name__
    lines = [
        f"{name}: {total:.4g} bytes a parameter ({elements:,} of them), expected at most {max_per_parameter:g}",
        *(
            f"  slot {slot} ({dtype}): {size / elements:.4g} a parameter"
            for (slot, dtype), size in slots.items()
        ),
        *(f"  {one.name} ({one.elements:,}): {one.per_element:.4g} as {one.kinds}" for one in over[:_SHOWN]),
    ]
    if len(over) > _SHOWN:
        lines.append(f"  and {len(over) - _SHOWN} parameters more")
    raise AssertionError("\n".join(lines))


def _assert_as_asked_for(optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise ValueError(  # noqa: TRY004 - the optimizer is fine, the limit is missing
            f"{type(optimizer).__name__} does not say how its state is to be stored: give max_per_parameter"
        )
    found, asked = optimizer.state_bytes(), optimizer.expected_state_bytes()
    sizes = {kind: (found.get(kind, 0), asked.get(kind, 0)) for kind in sorted(found.keys() | asked.keys())}
    wrong = [
        f"  slot {kind.slot} ({kind.dtype}, {kind.device}): {size:,} bytes, expected {expected:,}"
        for kind, (size, expected) in sizes.items()
        if size != expected
    ]
    if wrong:
        raise AssertionError("\n".join([f"{type(optimizer).__name__}'s state is not as asked for", *wrong]))


def _by_slot(optimizer: torch.optim.Optimizer) -> dict[tuple[str, str], int]:
    """Bytes by slot and storage type, the largest first."""
    slots = optimizer.slot_names() if isinstance(optimizer, Optimizer) else ()
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    for kind, size in count_bytes(state_leaves(optimizer.state), slots).items():
        if kind.slot != "step":
            sizes[kind.slot, kind.dtype] += size
    return dict(sorted(sizes.items(), key=lambda item: item[1], reverse=True))


def _held(optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> Iterator[_Held]:
    known = {id(param): name for name, param in model.named_parameters()} if model is not None else {}
    for number, group in enumerate(optimizer.param_groups):
        given = group.get("param_names") or ()
        for position, param in enumerate(group["params"]):
            counted = count_bytes(state_leaves({param: optimizer.state.get(param, {})}))
            kinds = {
                f"{kind.slot} {kind.dtype}": size for kind, size in counted.items() if kind.slot != "step"
            }
            if not kinds:
                continue
            default = given[position] if position < len(given) else f"parameter {position} of group {number}"
            name = known.get(id(param), default)
            yield _Held(name, param.numel(), sum(kinds.values()), ", ".join(kinds))
