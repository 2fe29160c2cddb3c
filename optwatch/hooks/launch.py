"""Finding the agent of a directory, and starting one where there is none.

The agent is started as a program, never imported: nothing of it runs in the training process.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from optwatch.board import find_agent, may_serve

__all__ = ["LOG", "ensure_agent", "find_agent", "start_agent", "wait_for_agent"]

LOG = "agent.log"
IDLE_SECONDS = 300
_CLAIM = "agent.starting"
_CLAIM_SECONDS = 10.0  # an agent is up within one
_LOG_BYTES = 1 << 20


class _Started(subprocess.Popen[bytes]):
    """A process that may outlive this one; Popen's finaliser would warn about that."""

    def __del__(self, *_: object) -> None:
        """Do not warn."""


_started: list[_Started] = []  # kept to be reaped: an agent that lost the election must not stay a zombie


def ensure_agent(directory: str | os.PathLike[str]) -> str | None:
    """`find_agent`, and if there is none start one, without waiting for it.

    Of several ranks that find none only one starts one; all find it a moment later. None does in a shared directory
    of another user. Cheap enough to be called every few seconds. Raises OSError if the agent cannot be started.
    """
    _started[:] = [process for process in _started if process.poll() is None]
    url = find_agent(directory)
    if url is None and may_serve(Path(directory)) and _claim(Path(directory) / _CLAIM):
        start_agent(directory)
    return url


def wait_for_agent(directory: str | os.PathLike[str], seconds: float) -> str | None:
    """`find_agent`, again and again for at most ``seconds``."""
    end = time.monotonic() + seconds
    while (url := find_agent(directory)) is None and time.monotonic() < end:
        time.sleep(0.02)
    return url


def start_agent(directory: str | os.PathLike[str]) -> int:
    """Start an agent that lives on its own, and return its process id. Raises OSError.

    It has a session and a log file of its own and no descriptor of ours (or ``train.py | tee log`` would not end
    before it does), and leaves after 300 s without boards.
    """
    root = Path.cwd() / directory
    command = [
        sys.executable, "-m", "optwatch.agent",
        "--dir", str(root), "--exit-when-idle", str(IDLE_SECONDS), "--nice", "10",
    ]  # fmt: skip
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    log = os.open(root / LOG, flags, 0o600)
    try:
        if os.fstat(log).st_size > _LOG_BYTES:
            os.ftruncate(log, 0)
        process = _Started(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            close_fds=True,
            start_new_session=True,
            cwd="/",  # python -m looks for modules in the working directory first
            env=_environment(),
        )
    finally:
        os.close(log)
    _started.append(process)
    return process.pid


def _claim(path: Path) -> bool:
    """Whether this process is the one to start an agent: the first to make the file, for ten seconds."""
    with contextlib.suppress(FileNotFoundError):
        if abs(time.time() - path.lstat().st_mtime) < _CLAIM_SECONDS:
            return False
        path.unlink()
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return False
    return True


def _environment() -> dict[str, str]:
    """Ours, such that the agent finds this very package from another working directory."""
    environment = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])
    given = [
        str(Path.cwd() / entry) for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry
    ]
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    if root not in given and root not in installed:
        given.insert(0, root)
    if given:
        environment["PYTHONPATH"] = os.pathsep.join(given)
    # The agent adds short columns; numpy's threads would only cost memory.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = "1"
    return environment
