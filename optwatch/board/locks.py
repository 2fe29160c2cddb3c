"""Liveness by POSIX record locks.

A record lock belongs to a process: it ends with it however it dies, is not inherited by a forked child, and is
seen across PID namespaces. Two of its properties need care and are kept in here: a process never sees its own lock
as a conflict, and closing *any* descriptor of a locked file drops the lock. So the locks of this process are
remembered by inode, and inside it such files are read through the very descriptor that holds the lock.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass


@dataclass
class _Held:
    fd: int
    pid: int  # a forked child inherits this memory, but not the lock
    borrowers: int = 0
    released: bool = False


_held: dict[tuple[int, int], _Held] = {}  # by device and inode
_borrowed: dict[int, _Held] = {}  # by descriptor


def try_lock(fd: int) -> bool:
    """Take the exclusive lock of the file without waiting. False when another process holds it."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    status = os.fstat(fd)
    _held[status.st_dev, status.st_ino] = _Held(fd, os.getpid())
    return True


def release(fd: int) -> None:
    """Unlock the file and close the descriptor, or leave that to the last who borrowed it."""
    status = os.fstat(fd)
    held = _held.pop((status.st_dev, status.st_ino), None)
    if held is None or not held.borrowers:
        os.close(fd)
        return
    fcntl.lockf(fd, fcntl.LOCK_UN)
    held.released = True


def held_here(status: os.stat_result) -> bool:
    """Whether this process holds the lock of that file."""
    held = _held.get((status.st_dev, status.st_ino))
    return held is not None and held.pid == os.getpid()


def borrow(status: os.stat_result) -> int | None:
    """The descriptor through which this process holds the lock of that file, if it does; `give_back` it."""
    if not held_here(status):
        return None
    held = _held[status.st_dev, status.st_ino]
    held.borrowers += 1
    _borrowed[held.fd] = held
    return held.fd


def give_back(fd: int) -> None:
    """End a `borrow`."""
    held = _borrowed[fd]
    held.borrowers -= 1
    if not held.borrowers:
        del _borrowed[fd]
        if held.released:
            os.close(fd)


def is_locked(fd: int) -> bool:
    """Whether a living process (this one included) holds the exclusive lock; ``fd`` need only be readable."""
    if held_here(os.fstat(fd)):
        return True
    try:
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.lockf(fd, fcntl.LOCK_UN)
    return False
