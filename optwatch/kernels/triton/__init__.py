"""The Triton backend: NVIDIA and AMD GPUs, or the CPU under Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from optwatch.kernels.plan import Combine, PlanSpec, PlanTensor

if TYPE_CHECKING:
    from optwatch.kernels.triton.driver import TritonPlan

OLDEST = (3, 3)  # the first Triton that takes tuples of functions
OLDEST_CHIP = (8, 0)  # the first with bfloat16 and a maximum that keeps NaN


class TritonBackend:
    """Runs the plans whose rule and codecs have a ``triton`` module."""

    name = "triton"

    def why_not(self, spec: PlanSpec, device: torch.device) -> str | None:
        """The reason why ``spec`` cannot run on ``device``, or None."""
        return (
            _why_not_device(device) or _why_not_installed() or _why_not_process(device) or _why_not_plan(spec)
        )

    def bind(
        self, spec: PlanSpec, tensors: Sequence[PlanTensor], combine: Combine | None = None
    ) -> TritonPlan:
        """Prepare to run ``spec`` on these tensors, all on one device."""
        from optwatch.kernels.triton.driver import TritonPlan  # noqa: PLC0415 - Triton is optional

        return TritonPlan(spec, tensors, combine)


def _why_not_device(device: torch.device) -> str | None:
    """Asked first: a process that trains on the CPU need not import Triton."""
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CHIP:
            return "compute capability 8.0 or newer is needed"
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "needs a CUDA device"


def _why_not_installed() -> str | None:
    try:
        import triton  # noqa: PLC0415 - Triton is optional
    except ImportError:
        return "Triton is not installed"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        return f"Triton {triton.__version__} is too old, 3.3 or newer is needed"
    return None


def _why_not_process(device: torch.device) -> str | None:
    """The interpreter is a choice of the whole process, and knows nothing but the host's addresses."""
    from optwatch.kernels.triton.driver import INTERPRETED  # noqa: PLC0415 - Triton is optional

    if device.type == "cpu" and not INTERPRETED:
        return "TRITON_INTERPRET was set after the kernels were imported"
    if device.type == "cuda" and INTERPRETED:
        return "TRITON_INTERPRET=1 interprets the kernels, which works on CPU tensors only"
    return None


def _why_not_plan(spec: PlanSpec) -> str | None:
    from optwatch.kernels.triton.compiling import TYPES, step_functions  # noqa: PLC0415 - Triton is optional

    for dtype in (spec.param_dtype, spec.grad_dtype):
        if dtype not in TYPES:
            return f"no kernel for {dtype}"
    rule, _, slots = step_functions(spec)
    if rule is None:
        return f"no kernel for rule {spec.rule.name}"
    for codec, functions in zip(spec.codecs, slots, strict=True):
        if functions is None:
            return f"no kernel for codec {codec.name}"
    return None
