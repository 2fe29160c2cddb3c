"""Adapters: how the state of each package's optimizers is read. One file each; the first that knows it is taken."""

from __future__ import annotations

import torch

from optwatch.hooks.adapters.base import Adapter, Math, Named, Stored
from optwatch.hooks.adapters.bitsandbytes import BitsAndBytes
from optwatch.hooks.adapters.own import Own
from optwatch.hooks.adapters.pytorch_optimizer import PYTORCH_OPTIMIZER
from optwatch.hooks.adapters.torch_optim import TORCH
from optwatch.hooks.adapters.torchao import TorchAO
from optwatch.hooks.adapters.transformers import TRANSFORMERS

__all__ = ["ADAPTERS", "UNKNOWN", "Adapter", "Math", "Named", "Stored", "adapter_for"]

#: Most particular first: many optimizers are derived from one of torch.optim.
ADAPTERS: list[Adapter] = [Own(), BitsAndBytes(), TorchAO(), TRANSFORMERS, PYTORCH_OPTIMIZER, TORCH]

#: For what nobody knows: slots whose names mean the same everywhere.
UNKNOWN = Named("unknown", {})


def adapter_for(optimizer: torch.optim.Optimizer) -> Adapter:
    """The adapter that reads ``optimizer``; for one that none knows, one that goes by names."""
    return next((adapter for adapter in ADAPTERS if adapter.knows(optimizer)), UNKNOWN)
