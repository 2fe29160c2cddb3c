"""pytorch_optimizer: about a hundred optimizers with plain tensors; those of a known name are read."""

from __future__ import annotations

from optwatch.hooks.adapters.base import Named

PYTORCH_OPTIMIZER = Named("pytorch_optimizer", {})
