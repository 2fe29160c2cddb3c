"""The storage format of each parameter, also where ``state=`` is a rule on their names, and the bytes it asks for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from optwatch.codecs import SlotFormats, StateFormat, check_state, codec_for, weight_codec
from optwatch.optim.count import StateKind
from optwatch.optim.sharded import largest_shard, local
from optwatch.optim.slots import shaped_like_parameter
from optwatch.optim.weights import KEY, correction_of
from optwatch.rules import Rule

STEP_BYTES = 4  # the float32 step counter of each parameter


def is_rule(state: StateFormat) -> bool:
    """Whether ``state`` depends on names: a function, or a mapping with a pattern among its keys."""
    return callable(state) or (isinstance(state, Mapping) and any(map(_is_pattern, state)))


def _is_pattern(key: object) -> bool:
    """A pattern has a wildcard or a dot; the name of a slot has neither."""
    return isinstance(key, str) and any(sign in key for sign in "*?[.")


def by_parameter(state: StateFormat, names: Sequence[str] | None) -> SlotFormats | list[SlotFormats]:
    """``state`` as a parameter group keeps it: a rule is applied, to one format for each of the parameters ``names``.

    The first pattern that matches a name counts; slots' names and ``"default"`` are for the parameters that none
    matches. Raises a ``ValueError`` for a rule on parameters without names.
    """
    if not is_rule(state):
        return state  # type: ignore[return-value]  # no rule
    if names is None:
        raise ValueError(
            "state= is a rule on names, but the parameters have none: construct the optimizer with "
            "model.named_parameters()"
        )
    choose = state if callable(state) else _first_match(state)  # type: ignore[arg-type]  # no rule is a string
    return [choose(name) for name in names]


def _first_match(state: Mapping[str, Any]) -> Callable[[str], SlotFormats]:
    patterns = {key: chosen for key, chosen in state.items() if _is_pattern(key)}
    others = {key: chosen for key, chosen in state.items() if key not in patterns}

    def choose(name: str) -> SlotFormats:
        return next((chosen for key, chosen in patterns.items() if fnmatchcase(name, key)), others)

    return choose


def format_at(group: Mapping[str, Any], position: int) -> SlotFormats:
    """The format of one parameter of a group."""
    state: SlotFormats | list[SlotFormats] = group["state"]
    return state[position] if isinstance(state, list) else state


def check_formats(group: Mapping[str, Any], rule: Rule) -> None:
    """Raise a ``ValueError`` unless every format of ``group`` is known and is for slots of ``rule``."""
    slots = [slot.name for slot in rule.slots]
    if not isinstance(group["state"], list):
        check_state(group["state"], slots)
        return
    for name, state in zip(group["param_names"], group["state"], strict=True):
        try:
            check_state(state, slots)
        except ValueError as error:
            raise ValueError(f"the format of parameter {name!r}: {error}") from None


def formats_of(group: Mapping[str, Any]) -> list[SlotFormats]:
    """The formats that a group has, each once."""
    state = group["state"]
    found: list[SlotFormats] = []
    for chosen in state if isinstance(state, list) else [state]:
        if chosen not in found:
            found.append(chosen)
    return found


def expected_bytes(
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Mapping[str, Any]],
    rule_for: Callable[[Mapping[str, Any]], Rule],
) -> dict[StateKind, int]:
    """The bytes that the formats of ``groups`` ask for, of the parameters that have ``state``."""
    expected: dict[StateKind, int] = defaultdict(int)
    for group in groups:
        for position, param in enumerate(group["params"]):
            if not state.get(param):
                continue
            own, device = local(param).numel(), str(param.device)
            expected[StateKind("step", "float32", device if group.get("capturable") else "cpu")] += STEP_BYTES
            for slot in rule_for(group).slots:
                codec = codec_for(format_at(group, position), slot.name, slot.kind, param.numel())
                for buffer in codec.buffers:
                    kind = StateKind(slot.name, str(buffer.dtype).removeprefix("torch."), device)
                    numel = own if shaped_like_parameter(buffer) else largest_shard(param)
                    expected[kind] += codec.length(buffer, numel) * buffer.dtype.itemsize
            if correction := correction_of(weight_codec(group["weights"], param.dtype)):
                kind = StateKind(KEY, str(correction.dtype).removeprefix("torch."), device)
                expected[kind] += own * correction.dtype.itemsize
    return dict(expected)
