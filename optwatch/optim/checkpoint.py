"""Loading optimizer state: checked in full before anything changes, and never cast.

torch.optim's own loader casts every state tensor to its parameter's dtype: int8 codes would become floats.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from optwatch.codecs import Codec, check_state, codec_for
from optwatch.kernels.random import keys, numbers
from optwatch.optim.formats import format_at
from optwatch.optim.interchange import Peer, peer_of
from optwatch.optim.layout import flat, memory_order
from optwatch.optim.sharded import local, local_state, origin
from optwatch.optim.slots import buffer_key, decode, identify, keep, shaped_like_parameter
from optwatch.optim.weights import found_format, load_correction
from optwatch.rules import Rule

#: Options of a group that stay the optimizer's own.
_OWN = {"params", "state", "weights", "schema"}


class Loadable(Protocol):
    """The optimizer, as far as loading is concerned."""

    param_groups: list[dict[str, Any]]
    state_conversions: int
    _optimizer_load_state_dict_pre_hooks: OrderedDict[
        int, Callable[[Any, dict[str, Any]], dict[str, Any] | None]
    ]
    _optimizer_load_state_dict_post_hooks: OrderedDict[int, Callable[[Any], None]]

    def rule_for(self, group: Mapping[str, Any]) -> Rule:
        """The rule of a group."""

    def check_options(self, group: Mapping[str, Any]) -> None:
        """Raise a ``ValueError`` for an option that is out of range."""

    def parameter_name(self, group: Mapping[str, Any], position: int) -> str:
        """How messages name a parameter."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over new state and groups."""


def load(optimizer: Loadable, state_dict: Mapping[str, Any], convert: bool) -> None:
    """See :meth:`optwatch.optim.Optimizer.load_state_dict`."""
    state_dict = dict(state_dict)
    # torch has no public way to run the hooks that it lets people register.
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():  # noqa: SLF001
        changed = before(optimizer, state_dict)
        if changed is not None:
            state_dict = changed
    _check_form(state_dict)
    peer = peer_of(state_dict)
    if peer is not None and not convert:
        raise ValueError(f"the checkpoint is one of {peer.NAME}: load it with convert=True")
    groups = _groups(optimizer, state_dict, peer)
    state, converted = _state(optimizer, state_dict, groups, convert, peer)
    optimizer.__setstate__({"state": state, "param_groups": groups})
    optimizer.state_conversions += converted
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():  # noqa: SLF001
        after(optimizer)


def _check_form(state_dict: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for what is not the state dict of any optimizer."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(
                f"not an optimizer's state dict: {key!r} is missing, found {sorted(map(str, state_dict))}"
            )
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping) or not all(isinstance(one, Mapping) for one in state.values()):
        raise ValueError("not an optimizer's state dict: 'state' is not a dict of dicts")
    if not isinstance(groups, Sequence) or not all(isinstance(one, Mapping) for one in groups):
        raise ValueError("not an optimizer's state dict: 'param_groups' is not a list of dicts")
    for number, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group.get("params"), Sequence):
            raise ValueError(  # noqa: TRY004 - what a checkpoint holds, not an argument of the wrong type
                f"not an optimizer's state dict: group {number} has no list 'params'"
            )


def _groups(optimizer: Loadable, state_dict: Mapping[str, Any], peer: Peer | None) -> list[dict[str, Any]]:
    """The optimizer's groups with the checkpoint's options. The formats stay what the constructor asked for."""
    saved, own = state_dict["param_groups"], optimizer.param_groups
    sizes, wanted = [len(group["params"]) for group in saved], [len(group["params"]) for group in own]
    if sizes != wanted:
        raise ValueError(
            f"the checkpoint has parameter groups of {sizes} parameters, the optimizer of {wanted}"
            + _named_difference(saved, own)
        )
    groups: list[dict[str, Any]] = []
    for old, new in zip(saved, own, strict=True):
        schema = old.get("schema", new["schema"])
        if schema != new["schema"]:
            raise ValueError(
                f"the checkpoint has schema {schema!r}; this version of optwatch reads {new['schema']}"
            )
        try:
            options = old if peer is None else peer.options(old, new)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"the options of group {len(groups)} are none of {peer and peer.NAME}: {error!r}, found {_shown(old)}"
            ) from None
        group = {
            **new,
            **{key: value for key, value in options.items() if key not in _OWN},
        }
        optimizer.check_options(group)
        groups.append(group)
    return groups


def _shown(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in {"params", "param_names"}}


def _named_difference(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> str:
    """Which parameters one side has and the other has not, where both sides have names."""
    if not all("param_names" in group for group in (*saved, *own)):
        return ""
    found, wanted = ({name for group in groups for name in group["param_names"]} for groups in (saved, own))
    return f"; it lacks {sorted(wanted - found)[:5]}, and has besides {sorted(found - wanted)[:5]}"


def _state(
    optimizer: Loadable,
    state_dict: Mapping[str, Any],
    groups: list[dict[str, Any]],
    convert: bool,
    peer: Peer | None,
) -> tuple[dict[Tensor, dict[str, Any]], int]:
    """The checkpoint's state, checked, converted if asked to, on the parameters' devices; and how many slots were."""
    found = dict(state_dict["state"])
    loaded: dict[Tensor, dict[str, Any]] = defaultdict(dict)  # as torch's: parameters may be stepped later
    converted = 0
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        for position, (param, number) in enumerate(zip(group["params"], saved["params"], strict=True)):
            if number not in found:
                continue  # it had not been stepped
            loader = _Parameter(optimizer, group, position, number)
            loaded[param] = loader.load(dict(found.pop(number)), convert, peer)
            converted += loader.converted
    if found:
        raise ValueError(f"the checkpoint has state for unknown parameters: {sorted(map(str, found))[:5]}")
    return loaded, converted


class _Parameter:
    """The loading of one parameter's state."""

    def __init__(self, optimizer: Loadable, group: Mapping[str, Any], position: int, index: int) -> None:
        self.rule, self.seed, self.index = optimizer.rule_for(group), int(group["seed"]), index
        self.weights, self.capturable = group["weights"], group.get("capturable")
        self.whole, self.format = group["params"][position], format_at(group, position)
        self.param = local(self.whole)
        self.name = optimizer.parameter_name(group, position)
        self.converted = 0

    def load(self, saved: MutableMapping[str, Any], convert: bool, peer: Peer | None) -> dict[str, Any]:
        """The state to use; a ``ValueError`` names the parameter, what was found and what was expected."""
        check_state(self.format, [slot.name for slot in self.rule.slots])
        saved = local_state(self.whole, saved)
        if peer is not None:
            try:
                saved = peer.read(saved, self.rule, self.param)
            except ValueError as error:
                raise ValueError(f"{peer.NAME}'s state of {self.name} does not fit: {error}") from None
            self.converted = len(self.rule.slots)
        if "step" not in saved and not self.rule.stepless:
            raise ValueError(f"the checkpoint's state of {self.name} has no 'step', found {sorted(saved)}")
        # Without a count, all that matters is that the first step lies behind.
        count = self._count(saved.get("step", 1.0))
        loaded: dict[str, Any] = {
            "step": torch.tensor(count, device=self.param.device if self.capturable else None)
        }
        state = local_state(self.whole, loaded)
        for slot in self.rule.slots:
            try:
                codec = identify(self.rule, slot, saved, self.param)
            except ValueError as error:
                raise ValueError(f"the checkpoint's state of {self.name} does not fit: {error}") from None
            wanted = codec_for(self.format, slot.name, slot.kind, self.whole.numel())
            ordered = self._same_order(codec, saved[slot.name]) or (codec.block == 1 and not codec.stochastic)
            if codec is wanted and ordered:
                state.update(self._take(codec, slot.name, saved))
            elif convert:
                self.converted += peer is None
                state.update(self._convert(codec, wanted, slot.name, saved))
            else:
                raise ValueError(self._refusal(codec, wanted, slot.name))
        try:
            state.update(load_correction(self.weights, saved, self.param, convert))
        except ValueError as error:
            raise ValueError(f"the checkpoint's state of {self.name} does not fit: {error}") from None
        self.converted += found_format(saved, self.param) != found_format(state, self.param)
        return loaded

    def _count(self, step: Any) -> float:
        """A number of steps, which libraries keep as a number or as a tensor of one element."""
        try:
            count = float(step)
        except (TypeError, ValueError, RuntimeError):
            count = math.nan
        if isinstance(step, str) or not (0 <= count < math.inf) or (isinstance(step, Tensor) and step.dim()):
            raise ValueError(f"'step' of {self.name} is {step!r}, expected a number of steps")
        return count

    def _same_order(self, codec: Codec, primary: Tensor) -> bool:
        # Packed codes in another order have another shape, and have been refused for it.
        return (
            not shaped_like_parameter(codec.buffers[0]) or flat(primary, memory_order(self.param)) is not None
        )

    def _refusal(self, codec: Codec, wanted: Codec, slot: str) -> str:
        if codec is wanted:
            return (
                f"the checkpoint's {slot!r} of {self.name} lies in another memory order than the parameter; load with "
                "convert=True to store it anew"
            )
        return (
            f"the checkpoint holds {slot!r} of {self.name} as {codec.name}, state={self.format!r} asks for "
            f"{wanted.name}: construct the optimizer with the checkpoint's format, or load with convert=True"
        )

    def _take(self, codec: Codec, slot: str, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        """Copies of the saved buffers on the parameter's device, in the parameter's memory order."""
        taken = {}
        for buffer in codec.buffers:
            key = buffer_key(codec, slot, buffer)
            like = self.param if shaped_like_parameter(buffer) else saved[key]
            taken[key] = torch.empty_like(
                like, dtype=buffer.dtype, device=self.param.device, requires_grad=False
            )
            taken[key].copy_(saved[key])
        return taken

    def _convert(self, codec: Codec, wanted: Codec, slot: str, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        """The saved values in the wanted format."""
        device = self.param.device
        buffers = {key: value.to(device) for key, value in saved.items() if isinstance(value, Tensor)}
        values = decode(codec, slot, self.param, buffers)
        random = None
        if wanted.stochastic:
            piece = origin(self.whole)
            key = keys(
                np.array([self.seed % 2**64], np.uint64),
                np.array([self.index + (piece.shard << 40)], np.uint64),
                1,
                np.zeros(1),
                np.array([piece.element], np.uint64),
            )
            random = numbers(key[0, 0].tolist(), 0, self.param.numel(), device)
        return keep(wanted, slot, self.param, values, random)
