"""FlashOptim's layout: torch's keys, or ``exp_avg::quantized`` with ``exp_avg::scales``.

Groups of 32 elements in the order of memory share an fp16 scale, which is kept as the same bits in bf16 for a bf16
parameter. ``error_bits``, the correction of a bf16 weight, becomes that of ``weights="split8"`` or ``"split16"``.

Signed slots: ``x = z / (2 - |z|) * scale`` with ``z = code / 127``; second moments: ``(code / 255 * scale)**2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optwatch.codecs import Kind
from optwatch.optim.layout import flat, memory_order, shaped
from optwatch.optim.weights import KEY
from optwatch.rules import Rule, Slot

NAME = "FlashOptim"
GROUP = 32
CODES, SCALES = "::quantized", "::scales"


def wrote(state_dict: Mapping[str, Any]) -> bool:
    """By the keys of the codes, or by an option that only it has."""
    return any("master_bytewidth" in group for group in state_dict["param_groups"]) or any(
        key.endswith(CODES) for state in state_dict["state"].values() for key in state
    )


def options(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The names are torch's. Whether its ``decouple_lr`` was set, no checkpoint says."""
    return {name: value for name, value in saved.items() if name in own and name not in {"params", "fused"}}


def read(saved: Mapping[str, Any], rule: Rule, param: Tensor) -> dict[str, Any]:
    """See :class:`optwatch.optim.interchange.Peer`."""
    state = {"step": saved["step"]} if "step" in saved else {}
    if rule.name == "lion":  # counts no steps there, and needs no count
        state.setdefault("step", torch.tensor(1.0))
    for slot in rule.slots:
        if slot.name + CODES in saved:
            state[slot.name] = _read(slot, saved, param)
        elif slot.name in saved:
            state[slot.name] = _tensor(saved, slot.name, torch.float32, torch.bfloat16, torch.float16).float()
    if "error_bits" in saved and param.dtype == torch.bfloat16:
        errors = _tensor(saved, "error_bits", torch.int8, torch.int16, torch.bfloat16)
        if errors.shape != param.shape:
            raise ValueError(
                f"'error_bits' has shape {tuple(errors.shape)}, the parameter {tuple(param.shape)}"
            )
        state[KEY] = _correction(errors, param)
    return state


def _correction(errors: Tensor, param: Tensor) -> Tensor:
    """The correction of a bf16 weight in 16 bits. Theirs counts parts of half a unit in the last place of the bf16.

    It comes as integers, or, made to look like a weight, as bf16: with 8 bits by value, with 16 by its bits.
    """
    if errors.dtype == torch.bfloat16:
        small = errors.isfinite().all() and torch.equal(errors, errors.round()) and errors.abs().max() <= 127
        errors = errors.to(torch.int8) if small else errors.view(torch.int16)
    bits = param.detach().view(torch.int16).to(errors.device)
    # Theirs is added to the weight, ours to its magnitude; and below a power of two ours goes on in the smaller unit.
    parts = errors.double() / torch.iinfo(errors.dtype).max * 32768 * torch.where(bits < 0, -1, 1)
    parts = torch.where((bits & 0x7F == 0) & (parts < 0), 2 * parts, parts)
    return parts.round().clamp(-32768, 32767).to(torch.int16)


def _tensor(saved: Mapping[str, Any], key: str, *dtypes: torch.dtype) -> Tensor:
    """An entry, which has to be a tensor of one of these types."""
    found = saved.get(key)
    if not isinstance(found, Tensor) or found.dtype not in dtypes:
        kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{key!r} should be a tensor of {' or '.join(map(str, dtypes))}, found {kind}")
    return found


def _read(slot: Slot, saved: Mapping[str, Any], param: Tensor) -> Tensor:
    codes = _tensor(saved, slot.name + CODES, torch.int8 if slot.kind is Kind.SIGNED else torch.uint8)
    scales = _tensor(saved, slot.name + SCALES, torch.float16, torch.bfloat16)
    if codes.shape != param.shape:
        raise ValueError(
            f"{slot.name + CODES!r} has shape {tuple(codes.shape)}, the parameter {tuple(param.shape)}"
        )
    count = -(-param.numel() // GROUP)
    if scales.numel() != count:
        raise ValueError(f"{slot.name + SCALES!r} has {scales.numel()} values, expected {count}")
    scales = scales.view(torch.float16) if scales.dtype == torch.bfloat16 else scales
    order = memory_order(codes)
    values = flat(codes, order)
    assert values is not None
    scale = scales.float().repeat_interleave(GROUP)[: param.numel()]
    if slot.kind is Kind.SIGNED:
        z = values.float() / 127
        values = z / (2 - z.abs()) * scale
    else:
        values = (values.float() / 255 * scale).square()
    return shaped(values, tuple(param.shape), order)
