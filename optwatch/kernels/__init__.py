"""Backends: they run plans. ``reference`` defines the truth; a kernel is an optimisation, never a definition."""

from __future__ import annotations

import functools
import warnings

import torch

from optwatch.kernels.plan import Backend, BoundPlan, PlanSpec, PlanTensor
from optwatch.kernels.reference import ReferenceBackend

__all__ = ["Backend", "BoundPlan", "PlanSpec", "PlanTensor", "backends", "choose_backend"]

#: In order of preference; the first that can run a plan does.
ORDER = ("triton", "cpu", "reference")


@functools.cache
def backends() -> dict[str, Backend]:
    """The backends by name, in order of preference. Kernels that cannot be loaded say so through ``why_not``."""
    from optwatch.kernels.cpu import CpuBackend
    from optwatch.kernels.triton import TritonBackend

    found: tuple[Backend, ...] = (TritonBackend(), CpuBackend(), ReferenceBackend())
    return {backend.name: backend for backend in found}


def choose_backend(spec: PlanSpec, device: torch.device, wanted: str | None = None) -> Backend:
    """The best backend for ``spec`` on ``device``, or the ``wanted`` one.

    A ``ValueError`` says why the wanted one cannot run it. Where nothing but the reference can, one warning says
    why, since it is many times slower.
    """
    if wanted is not None:
        check_backend(wanted)
        reason = backends()[wanted].why_not(spec, device)
        if reason is not None:
            raise ValueError(f"backend {wanted!r} cannot run {spec} on {device}: {reason}")
        return backends()[wanted]
    reasons = []
    for backend in backends().values():
        reason = backend.why_not(spec, device)
        if reason is None:
            if backend.name == "reference":
                _warn_once(f"{spec} runs on the slow reference backend on {device.type}: {'; '.join(reasons)}")
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise AssertionError("the reference backend runs everything")


def check_backend(name: str) -> None:
    """Raise a ``ValueError`` that names the valid backends unless ``name`` is one."""
    if name not in ORDER:
        raise ValueError(f"unknown backend {name!r}: use one of {', '.join(map(repr, ORDER))}, or None for the best")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
