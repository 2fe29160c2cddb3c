"""The incident that the demo can show: a resume that silently promotes low-bit state to fp32."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from optwatch.optim import Optimizer


def resume_as_fp32(model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Save a checkpoint and resume it as stock PyTorch does with low-bit state that it does not know.

    The checkpoint holds every slot decoded to fp32. Resuming puts these tensors into ``optimizer.state``, past the
    optimizer's own loader, which would have refused or converted them: from the next step on the state is fp32, four
    times its size, and nothing says so but the bytes.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with tempfile.TemporaryDirectory(prefix="optwatch-demo-") as directory:
        path = Path(directory, "checkpoint.pt")
        states = [optimizer.dequantized_state(parameter) for parameter in parameters]
        steps = [optimizer.state[parameter]["step"] for parameter in parameters]
        torch.save({"model": model.state_dict(), "slots": states, "steps": steps}, path)
        checkpoint = torch.load(path, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    for parameter, slots, step in zip(parameters, checkpoint["slots"], checkpoint["steps"], strict=True):
        state = optimizer.state[parameter]
        state.clear()  # the scales of the low-bit state go with it
        state.update({name: values.to(parameter.device) for name, values in slots.items()}, step=step)
