"""Liveness by POSIX record locks.

A record lock belongs to a process: it ends with it however it dies, is not inherited by a forked child, and is
seen across PID namespaces. Two of its properties need care and are kept in here: a process never sees its own
lock as a conflict, and closing *any* descriptor of a locked file drops the lock. So locks held by this process
are remembered by inode, and such files must be read through the descriptor that holds the lock.
"""

from __future__ import annotations

import fcntl
import os

_held: dict[tuple[int, int], tuple[int, int]] = {}  # (device, inode) -> (descriptor, pid of the holder)


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def try_lock(fd: int) -> bool:
    """Take the exclusive lock of the file without waiting. False when another process holds it."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    _held[_key(os.fstat(fd))] = (fd, os.getpid())
    return True


def forget(fd: int) -> None:
    """Drop the memory of a lock; call it before closing the descriptor that holds it."""
    _held.pop(_key(os.fstat(fd)), None)


def held_descriptor(status: os.stat_result) -> int | None:
    """The descriptor through which this process holds the lock of that file, if it does."""
    found = _held.get(_key(status))
    if found is None or found[1] != os.getpid():
        return None
    return found[0]


def is_locked(fd: int) -> bool:
    """Whether a living process (this one included) holds the exclusive lock; ``fd`` need only be readable."""
    if held_descriptor(os.fstat(fd)) is not None:
        return True
    try:
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.lockf(fd, fcntl.LOCK_UN)
    return False
