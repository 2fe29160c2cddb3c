"""torch.optim's layout: fp32 tensors of the parameter's shape under torch's own names, which are ours as well."""

from __future__ import annotations

from typing import Any

from optwatch.optim.interchange.source import OWN_OPTIONS, Source, numbered, stepped


def state_dict(optimizer: Source) -> dict[str, Any]:
    """What the torch.optim class of the same name loads; without ``step`` where that keeps none."""
    state = {}
    for one in stepped(optimizer):
        kept: dict[str, Any] = (
            {} if one.rule.stepless else {"step": optimizer.state[one.param]["step"].clone()}
        )
        state[one.number] = kept | optimizer.dequantized_state(one.param)
    groups = [
        {**{key: value for key, value in group.items() if key not in OWN_OPTIONS}, "params": numbers}
        for group, numbers in zip(optimizer.param_groups, numbered(optimizer), strict=True)
    ]
    return {"state": state, "param_groups": groups}


torch_state_dict = state_dict
