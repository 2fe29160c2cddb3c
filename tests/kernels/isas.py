"""The fixture that runs a test with each instruction set of the compiled library."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from optwatch.kernels.cpu.library import ISA_VARIABLE, library


@pytest.fixture(params=["best", "avx2", "baseline"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each instruction set that this processor has."""
    if request.param != "best":
        loaded = library()
        if request.param not in loaded.isas:
            pytest.skip(f"platform: this processor does not run {request.param}")
        monkeypatch.setenv(ISA_VARIABLE, request.param)
    library.cache_clear()
    yield
    library.cache_clear()
