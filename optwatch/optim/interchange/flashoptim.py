"""FlashOptim's layout: torch's keys, or ``exp_avg::quantized`` with ``exp_avg::scales``.

Groups of 32 elements in the order of memory share an fp16 scale, which is kept as the same bits in bf16 for a bf16
parameter.

Signed slots: ``x = z / (2 - |z|) * scale`` with ``z = code / 127``; second moments: ``(code / 255 * scale)**2``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optwatch.codecs import Kind
from optwatch.optim.layout import flat, memory_order, shaped
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
    if "error_bits" in saved:
        warnings.warn(
            "the checkpoint's correction of low-precision weights (error_bits) is not read: have FlashOptim write the "
            "weights with get_fp32_model_state_dict() to keep it",
            RuntimeWarning,
            stacklevel=2,
        )
    state = {"step": saved["step"]} if "step" in saved else {}
    if rule.name == "lion":  # counts no steps there, and needs no count
        state.setdefault("step", torch.tensor(1.0))
    for slot in rule.slots:
        if slot.name + CODES in saved:
            state[slot.name] = _read(slot, saved, param)
        elif slot.name in saved:
            state[slot.name] = saved[slot.name].float()
    return state


def _read(slot: Slot, saved: Mapping[str, Any], param: Tensor) -> Tensor:
    codes, scales = saved[slot.name + CODES], saved.get(slot.name + SCALES)
    if codes.shape != param.shape:
        raise ValueError(
            f"{slot.name + CODES!r} has shape {tuple(codes.shape)}, the parameter {tuple(param.shape)}"
        )
    count = -(-param.numel() // GROUP)
    if scales is None or scales.numel() != count:
        raise ValueError(
            f"{slot.name + SCALES!r} has {'no' if scales is None else scales.numel()} values, expected {count}"
        )
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
