"""Sums over tensors that no plan is bound to, by the compiled library."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optwatch.kernels.cpu.library import Library, library
from optwatch.kernels.plan import GRADIENT_SUMS

#: Element types that the library reads, by its names for them.
TYPES = {torch.float32: b"float32", torch.bfloat16: b"bfloat16"}

_DTYPE, _LAYOUT = operator.attrgetter("dtype"), operator.attrgetter("layout")
_ON_CPU = operator.attrgetter("is_cpu")
_dense = torch.ops.aten.is_non_overlapping_and_dense.default


def gradient_sums(tensors: Sequence[Tensor | None], rows: NDArray[np.float64]) -> bool:
    """Write ``GRADIENT_SUMS`` of each tensor to ``rows``, float64 ``[len(tensors), 3]``, zeros where there is none.

    False, and nothing is written, unless all are plain dense tensors on the CPU of types that the library reads. Their
    elements may lie in any order. Squares are added in fp32, lane by lane, over blocks of 512 elements, and in float64
    beyond them. Raises ValueError where ``rows`` has another shape or strides.
    """
    if rows.shape != (len(tensors), len(GRADIENT_SUMS)) or not rows.flags.c_contiguous:
        raise ValueError(f"expected rows of shape {(len(tensors), len(GRADIENT_SUMS))}, got {rows.shape}")
    loaded = library()
    given = [tensor for tensor in tensors if tensor is not None]
    types = set(map(_DTYPE, given))
    if not isinstance(loaded, Library) or not types <= TYPES.keys() or not _readable(given):
        return False
    addresses = array("Q", [0 if tensor is None else tensor.data_ptr() for tensor in tensors])
    rows.fill(0.0)
    for dtype in types:
        lengths = array("q", [t.numel() if t is not None and t.dtype == dtype else 0 for t in tensors])
        into = rows if len(types) == 1 else np.empty_like(rows)
        loaded.c.optwatch_cpu_gradient_sums(
            loaded.isa.encode(),
            TYPES[dtype],
            len(tensors),
            addresses.buffer_info()[0],
            lengths.buffer_info()[0],
            torch.get_num_threads(),
            into.ctypes.data,
        )
        if into is not rows:
            rows += into
    return True


def _readable(tensors: Sequence[Tensor]) -> bool:
    """Whether these are plain, on the CPU, and fill the memory between their first and their last element."""
    plain = (
        set(map(type, tensors)) <= {Tensor}
        and set(map(_LAYOUT, tensors)) <= {torch.strided}
        and all(map(_ON_CPU, tensors))
    )
    return plain and (
        all(map(Tensor.is_contiguous, tensors)) or all(bool(_dense(tensor)) for tensor in tensors)
    )
