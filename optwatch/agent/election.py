"""One agent per directory: the lock that elects it and the file that says where it serves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from optwatch.board import BoardDirectoryError, is_shared, locks, secure_directory
from optwatch.board.address import ADDRESS, LOCK
from optwatch.board.replace import replace_file


class Election:
    """Holds ``agent.lock`` for as long as this process is the agent; it ends with the process, however it dies."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._mode = 0o640 if is_shared(directory) else 0o600
        self._fd = -1

    def win(self) -> bool:
        """Become the agent of the directory. False while another process is."""
        path = self._directory / LOCK
        # Within one process the kernel would grant the lock twice.
        if path.exists() and locks.held_here(path.lstat()):
            return False
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        if not locks.try_lock(fd):
            os.close(fd)
            return False
        try:
            os.fchmod(fd, self._mode)
            # The address of an agent that was killed must not pass for ours while we are starting.
            (self._directory / ADDRESS).unlink(missing_ok=True)
        except OSError:
            locks.release(fd)
            raise
        self._fd = fd
        return True

    @property
    def held(self) -> bool:
        """Whether the directory names this process its agent: the lock may have been removed under it."""
        try:
            here, there = os.fstat(self._fd), os.lstat(self._directory / LOCK)
        except OSError:
            return False
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def renew(self) -> bool:
        """Be the agent still, where somebody has removed the lock. False if another process has taken it.

        Without a directory, or with one that is not ours, there is nothing to be the agent of and nobody else is.
        """
        if self.held:
            return True
        try:
            if not self._directory.exists():
                return True
            secure_directory(self._directory)
            old = self._fd
            won = self.win()
        except (OSError, BoardDirectoryError):
            return True
        locks.release(old)
        if not won:
            self._fd = -1
        return won

    def publish(self, facts: dict[str, Any]) -> None:
        """Write ``agent.json`` so that a reader sees all of it or the one before."""
        replace_file(self._directory / ADDRESS, json.dumps(facts).encode() + b"\n", self._mode)

    def resign(self) -> None:
        """Take the address back and let go of the lock."""
        if self._fd < 0:
            return
        if self.held:  # else the address is another agent's
            (self._directory / ADDRESS).unlink(missing_ok=True)
        locks.release(self._fd)
        self._fd = -1
