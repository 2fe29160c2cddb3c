"""The CPU backend: C++ kernels behind a plain C interface, see tables.h for how they are composed."""

from __future__ import annotations

from optwatch.kernels.cpu.backend import CpuBackend, CpuPlan

__all__ = ["CpuBackend", "CpuPlan"]
