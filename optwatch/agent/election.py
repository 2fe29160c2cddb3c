"""One agent per directory: the lock that elects it and the file that says where it serves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from optwatch.board import is_shared, locks
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
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        if locks.try_lock(self._fd):
            os.fchmod(self._fd, self._mode)
            # The address of an agent that was killed must not pass for ours while we are starting.
            (self._directory / ADDRESS).unlink(missing_ok=True)
            return True
        os.close(self._fd)
        self._fd = -1
        return False

    def publish(self, facts: dict[str, Any]) -> None:
        """Write ``agent.json`` so that a reader sees all of it or the one before."""
        replace_file(self._directory / ADDRESS, json.dumps(facts).encode() + b"\n", self._mode)

    def resign(self) -> None:
        """Take the address back and let go of the lock."""
        if self._fd < 0:
            return
        (self._directory / ADDRESS).unlink(missing_ok=True)
        locks.release(self._fd)
        self._fd = -1
