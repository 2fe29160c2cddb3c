"""Programs from Debian packages that tests run against; `tests/install-debian-packages` fetches them."""

from __future__ import annotations

import shutil

import pytest


def program(name: str) -> str:
    """The path of ``name``; without it the test skips, which CI counts as a failure."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: run tests/install-debian-packages")
    return path
