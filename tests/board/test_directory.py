"""Boards go only where nobody else can reach them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from optwatch.board import ENVIRONMENT, BoardDirectoryError, board_directory, secure_directory


def test_made_private(tmp_path: Path) -> None:
    """A new directory, with its parents, is for its owner alone; an existing one is taken as it is."""
    made = secure_directory(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700
    assert secure_directory(made) == made


def test_symlink_is_refused(tmp_path: Path) -> None:
    """A name in a shared directory may have been prepared by somebody else."""
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(BoardDirectoryError, match="symbolic link"):
        secure_directory(tmp_path / "link")


def test_foreign_owner_is_refused(tmp_path: Path) -> None:
    """Another user's directory: one given away by root, or root's own for anybody else."""
    foreign = Path("/usr")
    if os.geteuid() == 0:
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        os.chown(foreign, 12345, 12345)
    with pytest.raises(BoardDirectoryError, match="belongs to user"):
        secure_directory(foreign)


def test_writable_by_others_is_refused(tmp_path: Path) -> None:
    """Whoever can write there can replace a board."""
    tmp_path.chmod(0o777)
    with pytest.raises(BoardDirectoryError, match="mode 777, expected 700"):
        secure_directory(tmp_path)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    """A plain file is named as what it is, and as a parent too."""
    (tmp_path / "file").touch()
    with pytest.raises(BoardDirectoryError, match="is not a directory"):
        secure_directory(tmp_path / "file")
    with pytest.raises(BoardDirectoryError, match=ENVIRONMENT):
        secure_directory(tmp_path / "file" / "below")


def test_order_of_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment wins; without it shared memory, without that the temporary directory."""
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "mine"))
    assert board_directory() == tmp_path / "mine"
    monkeypatch.delenv(ENVIRONMENT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    name = f"optwatch-{os.getuid()}"
    expected = Path("/dev/shm") / name if os.access("/dev/shm", os.W_OK) else tmp_path / name
    existed = expected.exists()
    assert board_directory() == expected
    if not existed:
        expected.rmdir()
