"""Backends: they run plans. ``reference`` defines the truth; a kernel is an optimisation, never a definition."""

from __future__ import annotations

import functools
import warnings

import torch

from optwatch.kernels.plan import Backend, BoundPlan, PlanSpec, PlanTensor
from optwatch.kernels.reference import ReferenceBackend

__all__ = [
    "CAPTURING",
    "Backend",
    "BoundPlan",
    "PlanSpec",
    "PlanTensor",
    "backend",
    "check_backend",
    "choose_backend",
]

#: In order of preference; the first that can run a plan does.
ORDER = ("triton", "cpu", "reference")
#: Those whose plans are ``CapturablePlan``.
CAPTURING = ("triton",)


@functools.cache
def backend(name: str) -> Backend:
    """The backend of this name. One whose kernels cannot be loaded says so through ``why_not``."""
    if name == "triton":
        from optwatch.kernels.triton import TritonBackend  # noqa: PLC0415 - Triton takes a second to import

        return TritonBackend()
    if name == "cpu":
        from optwatch.kernels.cpu import CpuBackend  # noqa: PLC0415 - loads a shared library

        return CpuBackend()
    return ReferenceBackend()


def choose_backend(spec: PlanSpec, device: torch.device, wanted: str | None = None) -> Backend:
    """The best backend for ``spec`` on ``device``, or the ``wanted`` one.

    A ``ValueError`` says why the wanted one cannot run it. Where nothing but the reference can, one warning says
    why, since it is many times slower.
    """
    if wanted is not None:
        check_backend(wanted)
        reason = backend(wanted).why_not(spec, device)
        if reason is not None:
            raise ValueError(f"backend {wanted!r} cannot run {spec} on {device}: {reason}")
        return backend(wanted)
    reasons: list[str] = []
    for candidate in map(backend, ORDER):
        reason = candidate.why_not(spec, device)
        if reason is None:
            if candidate.name == "reference":
                _warn_once(
                    f"{spec} runs on the slow reference backend on {device.type}: {'; '.join(reasons)}"
                )
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    raise AssertionError("the reference backend runs everything")


def check_backend(name: str) -> None:
    """Raise a ``ValueError`` that names the valid backends unless ``name`` is one."""
    if name not in ORDER:
        raise ValueError(
            f"unknown backend {name!r}: use one of {', '.join(map(repr, ORDER))}, or None for the best"
        )


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
