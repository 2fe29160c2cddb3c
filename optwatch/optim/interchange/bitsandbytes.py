"""bitsandbytes' layout: ``state1`` and ``state2``, in 8 bits with ``qmap`` and ``absmax``, else fp32.

The codes are those of our ``int8_dynamic``, bit by bit, in blocks of 256 (2048 before version 0.44) of the row-major
order. bitsandbytes keeps the squared gradients of RMSprop and Adagrad with the signed map; those are decoded here.
Its Adam decays as AdamW does, whatever its class is called.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optwatch.codecs import SMALL_TENSOR, Kind
from optwatch.codecs.int8_dynamic.codec import FORMAT, dynamic_map
from optwatch.optim.interchange.source import Source, Stepped, numbered, stepped
from optwatch.rules import Rule, Slot

NAME = "bitsandbytes"
WRAPPED = (
    "__bnb_optimizer_quant_state__"  # the key of the tensors in its state_dict(), which hides them from FSDP
)
BLOCKS = (256, 2048)  # now, and before version 0.44


class Place(NamedTuple):
    """Where a slot is: in ``state1`` or ``state2``, and which of several there."""

    number: int
    row: int | None = None

    @property
    def kind(self) -> Kind:
        """Which map it has."""
        return Kind.SIGNED if self.number == 1 else Kind.SECOND_MOMENT

    def leading(self) -> tuple[int, ...]:
        """What stands before the parameter's shape in the tensor's."""
        return () if self.row is None else (2,)

    def of(self, tensor: Tensor) -> Tensor:
        """The slot's part of a tensor."""
        return tensor if self.row is None else tensor[self.row]


_ADAM = {"exp_avg": Place(1), "exp_avg_sq": Place(2)}
#: The slots of each rule that bitsandbytes has.
LAYOUTS: dict[str, dict[str, Place]] = {
    "adam": _ADAM,
    "adamw": _ADAM,
    "ademamix": {"exp_avg": Place(1, 0), "exp_avg_slow": Place(1, 1), "exp_avg_sq": Place(2)},
    "lion": {"exp_avg": Place(1)},
    "sgd_momentum": {"momentum_buffer": Place(1)},
    "rmsprop": {"square_avg": Place(1)},
    "adagrad": {"sum": Place(1)},
}


def layout_of(rule: Rule) -> dict[str, Place]:
    """Where the slots of ``rule`` are."""
    if rule.name not in LAYOUTS:
        raise ValueError(f"bitsandbytes has no {rule.name}, only {', '.join(LAYOUTS)}")
    return LAYOUTS[rule.name]


# --- reading ------------------------------------------------------------------------------------------------------


def wrote(state_dict: Mapping[str, Any]) -> bool:
    """By the keys of the tensors, with and without its wrapping."""
    return any(WRAPPED in state or "state1" in state for state in state_dict["state"].values())


def options(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Its ``betas`` hold the momentum of SGD and RMSprop's alpha."""
    taken = {name: saved[name] for name in ("lr", "eps", "weight_decay", "betas") if name in own}
    if "dampening" in own:
        taken |= {"momentum": saved["betas"][0], "dampening": 0, "nesterov": False}
    if "centered" in own:
        taken |= {"alpha": saved["betas"][0], "momentum": 0, "centered": False}
    if "beta3_warmup" in own:
        taken |= {"alpha": saved["alpha"], "alpha_warmup": saved["t_alpha"], "beta3_warmup": saved["t_beta3"]}
    if "decoupled_weight_decay" in own:
        taken["decoupled_weight_decay"] = True
    return taken


def read(saved: Mapping[str, Any], rule: Rule, param: Tensor) -> dict[str, Any]:
    """See :class:`optwatch.optim.interchange.Peer`."""
    tensors = saved.get(WRAPPED, saved)
    layout = layout_of(rule)
    state: dict[str, Any] = {"step": saved["step"]} if "step" in saved else {}
    for slot in rule.slots:
        state |= _read(slot, layout[slot.name], tensors, param)
    return state


def _read(slot: Slot, place: Place, tensors: Mapping[str, Any], param: Tensor) -> dict[str, Tensor]:
    """One slot by our keys: codes as they are where they are ours, else values."""
    key = f"state{place.number}"
    codes = _tensor(tensors, key, torch.uint8, torch.float32, torch.bfloat16, torch.float16)
    if codes.shape != (*place.leading(), *param.shape):
        raise ValueError(
            f"{key!r} has shape {tuple(codes.shape)}, expected {(*place.leading(), *param.shape)}"
        )
    if not codes.is_contiguous():
        raise ValueError(
            f"{key!r} has strides {codes.stride()}: expected row-major ones, the order of bitsandbytes' blocks; make "
            "the model contiguous before its checkpoint is written"
        )
    if codes.dtype != torch.uint8:
        return {slot.name: place.of(codes).float()}
    absmax, table = (
        place.of(_tensor(tensors, f"absmax{place.number}", torch.float32)),
        _tensor(tensors, f"qmap{place.number}", torch.float32, length=256),
    )
    lengths = {-(-param.numel() // block): block for block in reversed(BLOCKS)}
    block = lengths.get(len(absmax))
    if block is None:
        raise ValueError(f"'absmax{place.number}' has {len(absmax)} values, expected {max(lengths)}")
    codec = FORMAT[slot.kind]
    if block == codec.block and torch.equal(table.cpu(), dynamic_map(slot.kind)):
        return {slot.name: place.of(codes), f"{slot.name}_absmax": absmax}
    scale = absmax.repeat_interleave(block)[: param.numel()]
    return {slot.name: table[place.of(codes).int()] * scale.view(param.shape)}


def _tensor(tensors: Mapping[str, Any], key: str, *dtypes: torch.dtype, length: int | None = None) -> Tensor:
    """An entry, which has to be a tensor of one of these types, and of so many values."""
    found = tensors.get(key)
    if not isinstance(found, Tensor):
        raise ValueError(f"{key!r} should be a tensor, found {sorted(tensors)}")  # noqa: TRY004 - a file's content
    if found.dtype not in dtypes:
        raise ValueError(f"{key!r} has dtype {found.dtype}, expected {' or '.join(map(str, dtypes))}")
    if length is not None and tuple(found.shape) != (length,):
        raise ValueError(f"{key!r} has shape {tuple(found.shape)}, expected {(length,)}")
    return found


# --- writing ------------------------------------------------------------------------------------------------------


def state_dict(optimizer: Source) -> dict[str, Any]:
    """What bitsandbytes' 8-bit optimizer of this kind loads; tensors under 4096 elements are fp32, as it keeps them."""
    groups = [
        {**_options(optimizer.rule_for(group), group), "params": numbers}
        for group, numbers in zip(optimizer.param_groups, numbered(optimizer), strict=True)
    ]
    return {
        "state": {one.number: _write(optimizer, one) for one in stepped(optimizer)},
        "param_groups": groups,
    }


def _options(rule: Rule, group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group by its names; a ``ValueError`` for what it would ignore."""
    layout_of(rule)
    unknown = [name for name in ("maximize", "nesterov", "dampening", "lr_decay") if group.get(name)]
    if group["weight_decay"] and rule.name == "adam":
        unknown.append("weight_decay as a part of the gradient")
    if unknown:
        raise ValueError(f"bitsandbytes' {rule.name} has no {' or '.join(unknown)}")
    betas = group.get("betas", (group.get("momentum") or group.get("alpha", 0.0), 0.0))
    written = {
        "lr": float(group["lr"]),
        "betas": tuple(betas),
        "eps": group.get("eps", 0.0),
        "weight_decay": group["weight_decay"],
    }
    if any(place.number == 2 for place in LAYOUTS[rule.name].values()):
        written |= {"alpha": group.get("alpha", 0.0)}
        written |= {"t_alpha": group.get("alpha_warmup"), "t_beta3": group.get("beta3_warmup")}
    return written


def _write(optimizer: Source, one: Stepped) -> dict[str, Any]:
    """The state of one parameter."""
    own, values = optimizer.state[one.param], optimizer.dequantized_state(one.param)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for slot, place in LAYOUTS[one.rule.name].items():
        n, value = place.number, values[slot].contiguous()
        if value.numel() < SMALL_TENSOR:
            parts[f"state{n}"].append(value)
            continue
        codec = FORMAT[place.kind]
        buffers = codec.allocate(value.numel(), value.device)
        # The very codes where they are the same, since storing anew would change some by one.
        same = own.get(f"{slot}_absmax") is not None and own[slot].is_contiguous()
        if same and any(s.name == slot and s.kind is place.kind for s in one.rule.slots):
            buffers = {"codes": own[slot].view(-1).clone(), "absmax": own[f"{slot}_absmax"].clone()}
        else:
            codec.store(value.view(-1), buffers)
        parts[f"state{n}"].append(buffers["codes"].view(value.shape))
        parts[f"absmax{n}"].append(buffers["absmax"])
        parts[f"qmap{n}"] = [dynamic_map(place.kind).to(value.device)]
    tensors = {key: found[0] if len(found) == 1 else torch.stack(found) for key, found in parts.items()}
    return {"step": int(own["step"]), WRAPPED: tensors}
