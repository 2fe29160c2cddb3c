"""The host's side of a step: tables made once, one copy and two launches a step, no waiting."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from optwatch.kernels.plan import Keys, PlanSpec, PlanTensor, Scalars
from optwatch.kernels.triton import compiling
from optwatch.kernels.triton.step import CHEAP, SLOT_COLUMNS, fold, step

#: Whether this process runs kernels in Triton's interpreter, which was decided when the kernels were defined.
INTERPRETED = isinstance(step, InterpretedFunction)
FOLD_CHUNK = 1024
ALIGNMENT = 16  # bytes: of the parts of the buffer that is copied each step


class TritonPlan:
    """A plan bound to tensors on one device."""

    def __init__(self, spec: PlanSpec, tensors: Sequence[PlanTensor]) -> None:
        self.spec = spec
        self.tensors = tuple(tensors)  # keeps alive what the table points to
        self.device = tensors[0].param.device
        shape = compiling.INTERPRETER_SHAPE if INTERPRETED else compiling.device_shape(spec)
        lengths = np.array([tensor.param.numel() for tensor in tensors], np.int64)
        per_tensor = -(-lengths // shape.item)
        starts = np.concatenate([[0], np.cumsum(per_tensor)])
        self.count = int(starts[-1])
        owner = np.repeat(np.arange(len(tensors)), per_tensor)
        items = np.stack([owner, np.arange(self.count) - starts[owner]], 1)
        self.table = torch.from_numpy(_table(spec, tensors)).to(self.device)
        self.items = torch.from_numpy(items.astype(np.int32)).to(self.device)
        self.starts = torch.from_numpy(starts.astype(np.int32)).to(self.device)

        self.inputs = _Inputs(len(tensors), len(spec.rule.scalars), len(spec.codecs), self.device)
        # Two of each, taken in turns: whoever reads the rows of a step may do so until the second step after it.
        self.rows: dict[bool, list[Tensor]] = {
            full: list(torch.zeros(2, len(tensors), spec.columns, dtype=torch.float64, device=self.device))
            for full in (False, True)
        }
        self.partials = torch.empty(spec.columns * self.count, device=self.device)
        backend = "interpreter" if INTERPRETED else "hip" if torch.version.hip else "cuda"
        self.math = compiling.MATHEMATICS[backend].value
        self.functions = compiling.step_functions(spec)
        self.constants = {
            full: compiling.constants(spec, shape, full, self.math) | compiling.options(shape, full, backend)
            for full in (False, True)
        }

    def run(self, grads: Sequence[Tensor | None], scalars: Scalars, keys: Keys, full: bool) -> Tensor:
        """See :class:`optwatch.kernels.plan.BoundPlan`."""
        ring = self.rows[full]
        ring.reverse()
        rows = ring[0]
        if not self.count:
            return rows
        fields = self.spec.columns if full else CHEAP.value
        with self._device():
            addresses, device_scalars, device_keys = self.inputs.copy(grads, scalars, keys)
            step[(self.count,)](
                self.table, addresses, device_scalars, device_keys, self.items, self.partials, self.count,
                *self.functions, **self.constants[full],
            )  # fmt: skip
            fold[(len(self.tensors), fields)](
                self.partials, addresses, self.starts, rows, self.count, self.spec.columns,
                CHUNK=FOLD_CHUNK, MATH=self.math, enable_fp_fusion=False,
            )  # fmt: skip
        return rows

    def _device(self) -> AbstractContextManager[object]:
        """Kernels are launched on the current device, which need not be the plan's."""
        if INTERPRETED:  # numpy, which does the work then, warns of infinities that are meant
            return np.errstate(all="ignore")
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


class _Inputs:
    """What changes each step: gradients' addresses, scalars and keys, in one buffer and copied at once."""

    def __init__(self, tensors: int, scalars: int, slots: int, device: torch.device) -> None:
        sizes = (8 * tensors, 4 * tensors * scalars, 8 * tensors * (slots + 1))
        offsets = np.cumsum([0] + [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes])
        self.parts = [slice(int(at), int(at) + size) for at, size in zip(offsets, sizes, strict=False)]
        self.nbytes = int(offsets[-1])
        self.pinned = device.type == "cuda"
        self.buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        types = (torch.int64, torch.float32, torch.uint32)
        self.views = tuple(self.buffer[part].view(kind) for part, kind in zip(self.parts, types, strict=True))

    def copy(self, grads: Sequence[Tensor | None], scalars: Scalars, keys: Keys) -> tuple[Tensor, ...]:
        """Send these to the device, on its current stream; returns views of what arrives there."""
        # Pinned memory comes from torch's cache, which hands a block out again only when its copy is done.
        host = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=self.pinned)
        data = host.numpy()
        addresses, scalar_part, key_part = (data[part] for part in self.parts)
        addresses.view(np.int64)[:] = [0 if grad is None else grad.data_ptr() for grad in grads]
        scalar_part.view(np.float32)[:] = scalars.reshape(-1)
        key_part.view(np.uint32)[:] = keys.reshape(-1)
        self.buffer.copy_(host, non_blocking=True)
        return self.views


def _table(spec: PlanSpec, tensors: Sequence[PlanTensor]) -> NDArray[np.int64]:
    """The rows that the step kernel reads: length and addresses of each tensor."""
    rows = []
    for tensor in tensors:
        row = [tensor.param.numel()]
        for codec, buffers in ((spec.weight, tensor.weight), *zip(spec.codecs, tensor.slots, strict=True)):
            addresses = [buffers[buffer.name].data_ptr() for buffer in codec.buffers]
            row += addresses + [0] * (SLOT_COLUMNS.value - len(addresses))
        rows.append(row)
    return np.array(rows, np.int64)
