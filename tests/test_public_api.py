"""The names a user imports, and what importing them loads."""

import subprocess
import sys

import pytest

import optwatch


def test_the_export_list() -> None:
    """The public names are these; adding one is a decision."""
    assert optwatch.__all__ == ["Watch", "__version__", "optim", "watch"]
    assert all(getattr(optwatch, name) is not None for name in optwatch.__all__)
    assert dir(optwatch) == sorted(optwatch.__all__)


def test_an_unknown_name_lists_the_valid_ones() -> None:
    """A typing error is answered with the export list."""
    with pytest.raises(AttributeError, match=r"no attribute 'wacth'; it exports .*watch"):
        optwatch.wacth  # noqa: B018 - the access is the test


@pytest.mark.parametrize(
    "module", ["optwatch", "optwatch.agent", "optwatch.exporters", "optwatch.metrics", "optwatch.board"]
)
def test_loads_no_torch(module: str) -> None:
    """The agent runs on every node beside the training: it can afford neither torch's memory nor its start."""
    script = f"import sys, {module}; print(*sorted({{'torch', 'triton', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
