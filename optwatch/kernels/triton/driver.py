"""The host's side of a step: tables made once, one copy and two launches a step, no waiting."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from optwatch.kernels import capture
from optwatch.kernels.plan import DECISION, GRADIENT_SUMS, Combine, Keys, PlanSpec, PlanTensor, Scalars
from optwatch.kernels.triton import compiling
from optwatch.kernels.triton.passes import gradients, measure
from optwatch.kernels.triton.step import CHEAP, GATED, SKIPPED, SLOT_COLUMNS, ZERO, fold, step

#: Whether this process runs kernels in Triton's interpreter, which was decided when the kernels were defined.
INTERPRETED = isinstance(step, InterpretedFunction)
FOLD_CHUNK = 1024
ALIGNMENT = 16  # bytes: of the parts of the buffer that is copied each step


class TritonPlan:
    """A plan bound to tensors on one device."""

    def __init__(self, spec: PlanSpec, tensors: Sequence[PlanTensor], combine: Combine | None = None) -> None:
        self.spec = spec
        self.combine = combine
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
        self.norms = torch.empty(len(tensors), len(spec.rule.norms), dtype=torch.float64, device=self.device)
        # Of a step about which there is nothing to decide, or that the host has decided.
        neutral = [float(name in ("clip", "unscale")) for name in DECISION]
        self.decision = torch.tensor(neutral, dtype=torch.float64, device=self.device)
        self.behind = torch.zeros(len(tensors), dtype=torch.int32, device=self.device)
        self.known = np.zeros(len(tensors), np.int32)
        backend = "interpreter" if INTERPRETED else "hip" if torch.version.hip else "cuda"
        self.math = compiling.MATHEMATICS[backend].value
        self.functions = compiling.step_functions(spec)
        self.options = compiling.options(shape, False, backend)
        self.constants = {
            (full, gate): compiling.constants(spec, shape, full, gate, self.math)
            | compiling.options(shape, full, backend)
            for full in (False, True)
            for gate in (0, GATED.value, ZERO.value)
        }

    def run(
        self, grads: Sequence[Tensor | None], scalars: Scalars, keys: Keys, full: bool, zero: bool = False
    ) -> Tensor:
        """See :class:`optwatch.kernels.plan.BoundPlan`."""
        return self._run(grads, scalars, keys, full, ZERO.value if zero else 0, self.decision)

    def run_decided(
        self, grads: Sequence[Tensor | None], scalars: Scalars, keys: Keys, full: bool, zero: bool, decision: Tensor,
        counts: bool,
    ) -> Tensor:  # fmt: skip
        """See :class:`optwatch.kernels.plan.DeferringPlan`."""
        rows = self._run(grads, scalars, keys, full, ZERO.value if zero else GATED.value, decision)
        if counts:
            stepped = self.inputs.views[0] != 0
            self.behind += stepped * (decision[SKIPPED.value] != 0)
        return rows

    def uncount(self, stepped: NDArray[np.bool_]) -> None:
        """See :class:`optwatch.kernels.plan.DeferringPlan`."""
        self.known += stepped

    def sum_gradients(self, grads: Sequence[Tensor | None]) -> Tensor:
        """See :class:`optwatch.kernels.plan.BoundPlan`."""
        return self.sum_there(self.inputs.copy_addresses(grads))

    def sum_there(self, addresses: Tensor) -> Tensor:
        """See :class:`optwatch.kernels.plan.CapturablePlan`."""
        rows = torch.zeros(len(self.tensors), len(GRADIENT_SUMS), dtype=torch.float64, device=self.device)
        if not self.count:
            return rows
        fixed = {name: self.constants[False, 0][name] for name in ("GRAD", "ITEM", "TILE", "LEVELS")}
        with self._device():
            gradients[(self.count,)](
                self.table, addresses, self.items, self.partials, self.count, self.table.shape[1],
                **fixed, **self.options,
            )  # fmt: skip
            self._fold(addresses, rows, rows.shape[1])
        return rows

    def run_there(
        self,
        addresses: Tensor,
        scalars: Tensor,
        keys: Tensor,
        full: bool,
        zero: bool,
        decision: Tensor | None,
    ) -> Tensor:
        """See :class:`optwatch.kernels.plan.CapturablePlan`."""
        gate = 0 if decision is None else ZERO.value if zero else GATED.value
        inputs = addresses, self.behind, scalars, keys  # nobody is behind: the count is the device's
        return self._launch(inputs, full, gate, self.decision if decision is None else decision)

    def _run(
        self,
        grads: Sequence[Tensor | None],
        scalars: Scalars,
        keys: Keys,
        full: bool,
        gate: int,
        decision: Tensor,
    ) -> Tensor:
        inputs = self.inputs.copy(grads, scalars, keys, self.known)
        return self._launch(inputs, full, gate, decision)

    def _launch(self, inputs: tuple[Tensor, ...], full: bool, gate: int, decision: Tensor) -> Tensor:
        """The kernels of a step; ``inputs`` are addresses, what the host knows to be skipped, scalars and keys."""
        ring = self.rows[full]
        ring.reverse()
        rows = ring[0]
        if not self.count:
            if self.combine is not None:  # other ranks have pieces, and wait for what this one says
                self.combine(self.norms.zero_())
            return rows
        addresses, known, scalars, keys = inputs
        constants = self.constants[full, gate]
        with self._device():
            if self.norms.shape[1]:
                unused = ("FULL", "SECOND", "STOCHASTIC")
                measure[(self.count,)](
                    self.table, addresses, scalars, self.items, self.partials, decision, self.behind, known,
                    self.count, len(self.tensors), *self.functions,
                    **{name: value for name, value in constants.items() if name not in unused},
                )  # fmt: skip
                self._fold(addresses, self.norms, self.norms.shape[1])
            norms = self.norms if self.combine is None else self.combine(self.norms)
            step[(self.count,)](
                self.table, addresses, scalars, keys, self.items, self.partials, norms, decision,
                self.behind, known, self.count, len(self.tensors), *self.functions, **constants,
            )  # fmt: skip
            self._fold(addresses, rows, self.spec.columns if full else CHEAP.value)
        return rows

    def _fold(self, addresses: Tensor, rows: Tensor, fields: int) -> None:
        """Fold the partial sums of the items to the first ``fields`` of ``rows``."""
        fold[(len(self.tensors), fields)](
            self.partials, addresses, self.starts, rows, self.count, rows.shape[1],
            CHUNK=FOLD_CHUNK, MATH=self.math, enable_fp_fusion=False,
        )  # fmt: skip

    def _device(self) -> AbstractContextManager[object]:
        """Kernels are launched on the current device, which need not be the plan's."""
        if INTERPRETED:  # numpy, which does the work then, warns of infinities that are meant
            return np.errstate(all="ignore")
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


class _Inputs:
    """What changes each step: gradients' addresses, scalars and keys, in one buffer and copied at once."""

    def __init__(self, tensors: int, scalars: int, slots: int, device: torch.device) -> None:
        self.sizes = (8 * tensors, 4 * tensors, 4 * tensors * scalars, 8 * tensors * (slots + 1))
        self.pinned = device.type == "cuda"
        self.device = device
        self.alternatives = 0
        self._make(1)

    def _make(self, alternatives: int) -> None:
        """A buffer with room for so many rows of scalars and keys a tensor."""
        self.alternatives = alternatives
        sizes = (*self.sizes[:2], *(alternatives * size for size in self.sizes[2:]))
        offsets = np.cumsum([0] + [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes])
        self.parts = [slice(int(at), int(at) + size) for at, size in zip(offsets, sizes, strict=False)]
        self.buffer = torch.empty(int(offsets[-1]), dtype=torch.uint8, device=self.device)
        types = (torch.int64, torch.int32, torch.float32, torch.uint32)
        self.views = tuple(self.buffer[part].view(kind) for part, kind in zip(self.parts, types, strict=True))

    def copy_addresses(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Send the addresses alone."""
        self._refuse_capture()
        host = torch.empty(self.sizes[0], dtype=torch.uint8, pin_memory=self.pinned)
        host.numpy().view(np.int64)[:] = capture.addresses_of(grads)
        self.buffer[self.parts[0]].copy_(host, non_blocking=True)
        return self.views[0]

    def copy(
        self, grads: Sequence[Tensor | None], scalars: Scalars, keys: Keys, known: NDArray[np.int32]
    ) -> tuple[Tensor, ...]:
        """Send these to the device, on its current stream; returns views of what arrives there."""
        self._refuse_capture()
        needed = scalars.shape[0] if scalars.ndim == 3 else 1
        if needed > self.alternatives:
            self._make(needed)
        # Pinned memory comes from torch's cache, which hands a block out again only when its copy is done.
        host = torch.empty(self.buffer.numel(), dtype=torch.uint8, pin_memory=self.pinned)
        address_part, known_part, scalar_part, key_part = (host.numpy()[part] for part in self.parts)
        address_part.view(np.int64)[:] = capture.addresses_of(grads)
        known_part.view(np.int32)[:] = known
        scalar_part.view(np.float32)[: scalars.size] = scalars.reshape(-1)
        key_part.view(np.uint32)[: keys.size] = keys.reshape(-1)
        self.buffer.copy_(host, non_blocking=True)
        return self.views

    def _refuse_capture(self) -> None:
        """What is sent here is written anew for each step: a graph would replay whatever lies there by then."""
        if capture.capturing(self.device):
            raise RuntimeError(
                "step() is being captured into a CUDA graph: construct the optimizer with capturable=True, or set it "
                "in every group, and take a step before the capture"
            )


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
