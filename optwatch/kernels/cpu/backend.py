"""The driver of the CPU kernels: binds plans to addresses and refreshes what changes from step to step."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from optwatch.codecs import Codec
from optwatch.kernels.cpu.library import MAX_BUFFERS, MAX_SLOTS, Library, LibraryError, library
from optwatch.kernels.plan import GRADIENT_SUMS, Combine, Keys, PlanSpec, PlanTensor, Scalars
from optwatch.kernels.reference import concluded


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class CpuBackend:
    """Runs plans whose rule, codecs and element types all have a ``cpu.h``."""

    name = "cpu"

    def why_not(self, spec: PlanSpec, device: torch.device) -> str | None:
        """The reason why ``spec`` cannot run on ``device``, or None if it can."""
        if device.type != "cpu":
            return f"it runs on the CPU only, not on {device.type}"
        loaded = library()
        if isinstance(loaded, LibraryError):
            return str(loaded)
        if len(spec.codecs) > MAX_SLOTS:
            return f"it has room for {MAX_SLOTS} slots, the rule {spec.rule.name!r} has {len(spec.codecs)}"
        needed = [("rule", spec.rule.name)]
        needed += [("codec", codec.name) for codec in (*spec.codecs, spec.weight)]
        needed += [("type", _type_name(dtype)) for dtype in (spec.param_dtype, spec.grad_dtype)]
        missing = [f"{kind} {name!r}" for kind, name in needed if not loaded.has(kind, name)]
        return f"it has no kernel for {', '.join(missing)}" if missing else None

    def bind(self, spec: PlanSpec, tensors: Sequence[PlanTensor], combine: Combine | None = None) -> CpuPlan:
        """Prepare to run ``spec`` on these tensors; a ``ValueError`` says why that is impossible."""
        reason = self.why_not(spec, tensors[0].param.device)
        loaded = library()
        if reason is not None or isinstance(loaded, LibraryError):
            raise ValueError(f"the CPU kernels cannot run {spec}: {reason}")
        return CpuPlan(loaded, spec, tensors, combine)


class CpuPlan:
    """A plan bound to the addresses of parameters and state; it keeps them alive."""

    def __init__(
        self,
        loaded: Library,
        spec: PlanSpec,
        tensors: Sequence[PlanTensor],
        combine: Combine | None = None,
    ) -> None:
        self.spec = spec
        self._combine = combine
        self._library = loaded
        self.tensors = tuple(tensors)
        n, slots = len(self.tensors), len(spec.codecs)
        numel = np.array([tensor.param.numel() for tensor in self.tensors], np.int64)
        params = np.array([_address(tensor.param, spec.param_dtype) for tensor in self.tensors], np.uint64)
        corrections = np.array([_correction(spec.weight, tensor) for tensor in self.tensors], np.uint64)
        buffers = np.zeros((n, slots, MAX_BUFFERS), np.uint64)
        for i, tensor in enumerate(self.tensors):
            for s, (codec, slot) in enumerate(zip(spec.codecs, tensor.slots, strict=True)):
                for b, buffer in enumerate(codec.buffers):
                    _check_length(slot[buffer.name], codec.length(buffer, int(numel[i])), buffer.name)
                    buffers[i, s, b] = _address(slot[buffer.name], buffer.dtype)
        names = (ctypes.c_char_p * slots)(*(codec.name.encode() for codec in spec.codecs))
        self._handle = loaded.c.optwatch_cpu_bind(
            loaded.isa.encode(),
            spec.rule.name.encode(),
            names,
            spec.weight.name.encode(),
            _type_name(spec.grad_dtype).encode(),
            n,
            numel.ctypes.data,
            params.ctypes.data,
            corrections.ctypes.data,
            buffers.ctypes.data,
        )
        weakref.finalize(self, loaded.c.optwatch_cpu_free, self._handle)
        self._run = loaded.c.optwatch_cpu_run
        # What a step hands over is copied to where it is read: asking numpy for an address takes longer.
        self._grads = array("Q", bytes(8 * n))
        self._scalars = np.zeros((n, len(spec.rule.scalars)), np.float32)
        self._keys = np.zeros((n, slots + 1, 2), np.uint32)
        self._inputs = self._grads.buffer_info()[0], self._scalars.ctypes.data, self._keys.ctypes.data
        self._rows = [torch.zeros(n, spec.columns, dtype=torch.float64) for _ in range(2)]
        self._addresses = [rows.data_ptr() for rows in self._rows]
        self._turn = 0

    def sum_gradients(self, grads: Sequence[Tensor | None]) -> Tensor:
        """See :class:`optwatch.kernels.plan.BoundPlan`."""
        rows = torch.empty(len(self.tensors), len(GRADIENT_SUMS), dtype=torch.float64)
        self._grads[:] = _addresses(grads)
        self._library.c.optwatch_cpu_run_gradients(
            self._handle, self._inputs[0], torch.get_num_threads(), rows.data_ptr()
        )
        return rows

    def run(
        self, grads: Sequence[Tensor | None], scalars: Scalars, keys: Keys, full: bool, zero: bool = False
    ) -> Tensor:
        """See :class:`optwatch.kernels.plan.BoundPlan`."""
        if (
            len(grads) != len(self.tensors)
            or scalars.shape != self._scalars.shape
            or keys.shape != self._keys.shape
        ):
            raise ValueError(
                f"expected {len(self.tensors)} gradients, scalars {self._scalars.shape} and keys {self._keys.shape}, "
                f"got {len(grads)}, {scalars.shape} and {keys.shape}"
            )
        self._grads[:] = _addresses(grads)
        self._scalars[:] = scalars
        self._keys[:] = keys
        threads = torch.get_num_threads()
        if self.spec.rule.norms:
            self._scalars[:] = concluded(self.spec.rule, self._scalars, self._sum_norms(zero, threads))
        self._turn ^= 1
        self._run(self._handle, *self._inputs, full, zero, threads, self._addresses[self._turn])
        return self._rows[self._turn]

    def _sum_norms(self, zero: bool, threads: int) -> Tensor:
        """The sums of squares of what the rule takes norms of, ``[n, norms]``."""
        sums = torch.empty(len(self.tensors), len(self.spec.rule.norms), dtype=torch.float64)
        self._library.c.optwatch_cpu_run_norms(
            self._handle, *self._inputs[:2], zero, threads, sums.data_ptr()
        )
        return sums if self._combine is None else self._combine(sums)


def _addresses(grads: Sequence[Tensor | None]) -> array[int]:
    """Where the gradients are, 0 where there is none."""
    try:  # the same as below, in half the time
        return array("Q", map(torch.Tensor.data_ptr, grads))  # type: ignore[arg-type]
    except TypeError:
        return array("Q", [0 if grad is None else grad.data_ptr() for grad in grads])


def _address(tensor: Tensor, dtype: torch.dtype) -> int:
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(
            f"expected a contiguous {dtype} tensor on the CPU, got {tensor.dtype} with strides {tensor.stride()} "
            f"on {tensor.device}"
        )
    return tensor.data_ptr()


def _correction(codec: Codec, tensor: PlanTensor) -> int:
    """The address of what a weight's codec keeps beside the parameter, 0 if it is nothing."""
    for buffer in codec.buffers[1:]:
        _check_length(tensor.weight[buffer.name], tensor.param.numel(), buffer.name)
        return _address(tensor.weight[buffer.name], buffer.dtype)
    return 0


def _check_length(tensor: Tensor, expected: int, name: str) -> None:
    if tensor.numel() != expected:
        raise ValueError(f"the buffer {name!r} has {tensor.numel()} values, expected {expected}")
