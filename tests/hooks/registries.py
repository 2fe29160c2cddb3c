"""Every optimizer of torch.optim, bitsandbytes, torchao, transformers and pytorch_optimizer, and how to make one.

The packages say themselves which there are; what stands here is only what a class needs besides its parameters, and
why one cannot be run here.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytorch_optimizer
import torch
import torchao.optim
import transformers.optimization
from torch import nn

PACKAGES = {
    "torch.optim": torch.optim,
    "bitsandbytes": bitsandbytes.optim,
    "torchao": torchao.optim,
    "transformers": transformers.optimization,
    "pytorch_optimizer": pytorch_optimizer,
}

#: Arguments that a class cannot do without.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "transformers.Adafactor": {"lr": None},
    "bitsandbytes.LARS": {"lr": 1e-3, "momentum": 0.9},
    "bitsandbytes.LARS8bit": {"lr": 1e-3, "momentum": 0.9},
    "bitsandbytes.LARS32bit": {"lr": 1e-3, "momentum": 0.9},
    "bitsandbytes.PytorchLARS": {"lr": 1e-3, "momentum": 0.9},
    "bitsandbytes.SGD": {"lr": 1e-3, "momentum": 0.9},
    "bitsandbytes.SGD8bit": {"lr": 1e-3, "momentum": 0.9},
    "bitsandbytes.SGD32bit": {"lr": 1e-3, "momentum": 0.9},
    "torch.optim.SGD": {"lr": 1e-3, "momentum": 0.9},
    "pytorch_optimizer.BSAM": {"num_data": 100},
    "pytorch_optimizer.Ranger21": {"num_iterations": 100},
    "pytorch_optimizer.SAM": {"base_optimizer": torch.optim.AdamW},
    "pytorch_optimizer.FriendlySAM": {"base_optimizer": torch.optim.AdamW},
    "pytorch_optimizer.LookSAM": {"base_optimizer": torch.optim.AdamW},
}
#: Those that take an optimizer instead of parameters.
AROUND = {"Lookahead", "OrthoGrad", "ScheduleFreeWrapper", "TRAC"}
#: Those that work on matrices only.
MATRICES = {"torch.optim.Muon", "pytorch_optimizer.SpectralSphere"}
#: Those whose parameters come in groups that say whether they are matrices for Newton-Schulz iterations.
MUON = {"AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon"}
SPARSE = {"torch.optim.SparseAdam"}
#: Those that differentiate twice.
TWICE = {"AdaHessian", "SophiaH"}
#: Those that are not run, each with its reason.
LEFT_OUT = {
    "bitsandbytes.AdEMAMix32bit": "its step fails on the CPU: a shape that does not broadcast",
    "bitsandbytes.PagedAdEMAMix32bit": "its step fails on the CPU: a shape that does not broadcast",
    "torchao.CPUOffloadOptimizer": "asserts a GPU",
    "transformers.LayerWiseDummyOptimizer": "does nothing: its work is done in hooks of GaLore",
    "pytorch_optimizer.AdaLOMO": "takes the model, and steps in the backward pass without optimizer.step()",
    "pytorch_optimizer.LOMO": "takes the model, and steps in the backward pass without optimizer.step()",
    "pytorch_optimizer.AdamMini": "takes a transformer by the names of its layers",
    "pytorch_optimizer.AliG": "takes the loss as a number of its closure, and keeps no state without momentum",
    "pytorch_optimizer.DeMo": "needs einops and a process group",
    "pytorch_optimizer.DistributedMuon": "needs a process group",
    "pytorch_optimizer.GSAM": "takes the model and a scheduler",
    "pytorch_optimizer.WSAM": "takes the model",
    "pytorch_optimizer.MuonClip": "takes the model's configuration of attention",
    "pytorch_optimizer.PCGrad": "no torch.optim.Optimizer of its own parameters",
    "pytorch_optimizer.SafeFP16Optimizer": "no torch.optim.Optimizer of its own parameters",
    "pytorch_optimizer.Kron": "takes ten seconds for its first step; Q is a list like SOAP's",
}


def names() -> list[str]:
    """``package.Class`` of all that can be run here."""
    return [
        f"{package}.{name}"
        for package, module in PACKAGES.items()
        for name, kind in vars(module).items()
        if inspect.isclass(kind)
        and issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
        and not name.startswith("_")
        and f"{package}.{name}" not in LEFT_OUT
    ]


class Training:
    """A small model with an optimizer of this name; the weight is large enough for 8-bit state.

    ``options`` are given to the optimizer besides what it cannot do without.
    """

    def __init__(self, name: str, **options: Any) -> None:
        torch.manual_seed(0)
        self.name, self.short = name, name.rpartition(".")[2]
        kind = getattr(PACKAGES[name.rpartition(".")[0]], self.short)
        bias = name not in MATRICES
        first: nn.Module = nn.Linear(64, 80, bias=bias)
        if name in SPARSE:
            first = nn.Embedding(100, 80, sparse=True)
        self.model = nn.Sequential(first, nn.Tanh(), nn.Linear(80, 64, bias=bias))
        if name in SPARSE:
            self.model[2].requires_grad_(False)
        params: Any = [p for p in self.model.parameters() if p.requires_grad]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer = self._make(kind, params, options)

    def _make(
        self, kind: Callable[..., torch.optim.Optimizer], params: Any, options: dict[str, Any]
    ) -> torch.optim.Optimizer:
        package = self.name.rpartition(".")[0]
        if package == "pytorch_optimizer" and self.short in AROUND:
            made = kind(torch.optim.AdamW(params, lr=1e-3))
            if self.short == "ScheduleFreeWrapper":
                made.train()
            return made
        if package == "pytorch_optimizer" and self.short in MUON:
            groups = [
                (True, [p for p in params if p.dim() == 2]),
                (False, [p for p in params if p.dim() < 2]),
            ]
            return kind([{"params": members, "use_muon": use} for use, members in groups])
        arguments = ARGUMENTS.get(self.name)
        if arguments is None:
            arguments = {} if package == "pytorch_optimizer" else {"lr": 1e-3}
        return kind(params, **arguments, **options)

    def step(self) -> None:
        """One step on random data."""

        def closure() -> torch.Tensor:
            x = torch.randint(100, (4,)) if self.name in SPARSE else torch.randn(4, 64)
            loss = self.model(x).square().mean()
            loss.backward(create_graph=self.short in TWICE)
            return loss

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer.zero_grad()
            closure()
            try:
                self.optimizer.step()
            except Exception:  # noqa: BLE001 - each says in its own way that it wants a closure
                self.optimizer.step(closure)
