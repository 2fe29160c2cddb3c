"""Which rank this is where no launcher says so, and how many ranks hold the same tensors."""

from __future__ import annotations

import math
import os

import torch
from torch.nn.parallel import DistributedDataParallel


def tensor_replicas(tensor: torch.Tensor, others: int) -> int:
    """The ranks that hold the same piece of a DTensor as this one; ``others`` for any other tensor."""
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return others
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    return math.prod(mesh.size(i) for i, place in enumerate(placements) if place.is_replicate())


def model_replicas(model: torch.nn.Module | None) -> int:
    """The ranks among which DistributedDataParallel copies the model, or a part of it; 1 without."""
    if model is not None:
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                return int(module.process_group.size())
    return 1


def rank_facts() -> dict[str, int]:
    """Rank and world size of the process group, for processes that were spawned without a launcher's variables."""
    if "RANK" in os.environ or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {}
    return {"rank": torch.distributed.get_rank(), "world_size": torch.distributed.get_world_size()}
