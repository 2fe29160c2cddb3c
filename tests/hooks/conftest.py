"""Fixtures of the tests of watching."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An empty directory that boards may be made in."""
    made = tmp_path / "boards"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture
def eager() -> Iterator[None]:
    """Without compilation: torchao's of its step takes a minute."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
