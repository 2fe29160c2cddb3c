"""What the host knows about a process."""

from __future__ import annotations

import os
from pathlib import Path

_HOST_NAMESPACE = 0xEFFFFFFC  # the inode of the first PID namespace, fixed in the kernel
_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(pid: int) -> int | None:
    """Resident memory of a process in bytes; None if it cannot be read (gone, or no /proc)."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return None


def in_host_namespace() -> bool:
    """Whether this process sees process ids as the host and its drivers do."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino == _HOST_NAMESPACE
    except OSError:
        return False
