"""Two steps of the installed FlashOptim, its checkpoint and the weights after a third: ``flashoptim_run.py FILE``.

A program of its own, since its kernels run in Triton's interpreter here, which is a choice of the whole process. Its
steps ask for CUDA in words only; what quantises is its own code.
"""

from __future__ import annotations

import copy
import sys
import warnings

import torch
import triton
from torch import nn


def first_configuration(configs, **_):
    """In place of triton.autotune, which times launches on a GPU: the first configuration."""

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            chosen = configs[0].kwargs
            return lambda *given: self.kernel[grid(chosen)](*given, **chosen)

    return Kernel


triton.autotune = first_configuration
torch.cuda.is_available = lambda: True
import flashoptim.optimizers as flash  # noqa: E402 - its kernels are made when it is imported

flash._get_sm_count = lambda: 1


def set_data(self, data):
    """As theirs, without the check for a CUDA tensor."""
    self._data = None
    self._quantized, self._scales = flash.quantize(
        data, signed=self._signed, sqrt=self._sqrt, softsign=self._softsign
    )


flash._MaybeQuantizedTensor.set_data = set_data


def give(params, step):
    for i, param in enumerate(params):
        gen = torch.Generator().manual_seed(100 * step + i)
        param.grad = torch.randn(param.shape, generator=gen).to(param.dtype)


def run(kind, dtype, **options):
    gen = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=gen).to(dtype)) for shape in ((8, 70), (33,))]
    optimizer = kind(params, lr=1e-2, master_weight_bits=None, fused=False, **options)
    for step in range(2):
        give(params, step)
        optimizer.step()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    before = [param.detach().clone() for param in params]
    give(params, 2)
    grads = [param.grad.clone() for param in params]
    optimizer.step()
    after = [param.detach() for param in params]
    return {"checkpoint": checkpoint, "before": before, "grads": grads, "after": after}


#: Kind, element type, whether the checkpoint is compressed.
RUNS = {
    ("AdamW", torch.float32, True): {"betas": (0.8, 0.98), "weight_decay": 0.1},
    ("AdamW", torch.float32, False): {"weight_decay": 0.1},
    ("AdamW", torch.bfloat16, True): {},
    ("Adam", torch.float32, True): {"weight_decay": 0.1},
    ("Lion", torch.float32, True): {},
    ("SGD", torch.float32, True): {"momentum": 0.9},
}


def main():
    warnings.simplefilter("ignore")
    found = {
        f"{name} {dtype} {compressed}": run(
            getattr(flash, f"Flash{name}"), dtype, compress_state_dict=compressed, **options
        )
        for (name, dtype, compressed), options in RUNS.items()
    }
    torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
