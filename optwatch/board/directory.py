"""Where boards live: a private directory in shared memory, per user."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from pathlib import Path

from optwatch.board.errors import BoardDirectoryError, BoardSchemaError

SUFFIX = ".board"
ENVIRONMENT = "OPTWATCH_DIR"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def board_directory() -> Path:
    """The directory of this user's boards, made if it is not there.

    ``OPTWATCH_DIR`` wins and is then the only candidate; else ``/dev/shm/optwatch-<uid>``, else the same name in
    the temporary directory. Raises BoardDirectoryError naming what is wrong with each candidate.
    """
    override = os.environ.get(ENVIRONMENT)
    if override:
        return secure_directory(override)
    name = f"optwatch-{os.getuid()}"
    reasons = []
    for root in ("/dev/shm", tempfile.gettempdir()):  # noqa: S108 - checked by secure_directory
        if not Path(root).is_dir():  # no shared memory here, and it is not ours to make
            continue
        try:
            return secure_directory(Path(root) / name)
        except BoardDirectoryError as error:
            reasons.append(str(error))
    raise BoardDirectoryError("; ".join(reasons) or f"no directory for boards found; set {ENVIRONMENT}")


def secure_directory(path: str | os.PathLike[str]) -> Path:
    """Make the directory (mode 0700) if needed and check it.

    Raises BoardDirectoryError if it is a symlink, belongs to another user, can be written by others, or is not
    writable: names in a shared /dev/shm can be squatted.
    """
    path = Path.cwd() / path  # not resolved: a symlink is to be seen
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = os.lstat(path)
    except OSError as error:
        raise BoardDirectoryError(f"{path}: cannot be made: {error.strerror}; set {ENVIRONMENT}") from error
    problem = None
    if stat.S_ISLNK(status.st_mode):
        problem = "is a symbolic link"
    elif not stat.S_ISDIR(status.st_mode):
        problem = "is not a directory"
    elif status.st_uid != os.geteuid():
        problem = f"belongs to user {status.st_uid}, not to {os.geteuid()}"
    elif status.st_mode & 0o022:
        problem = f"can be written by others (mode {status.st_mode & 0o777:o}, expected 700)"
    elif not os.access(path, os.W_OK | os.X_OK):
        problem = "is not writable"
    if problem:
        raise BoardDirectoryError(f"{path}: {problem}; remove it or set {ENVIRONMENT}")
    return path


def board_name(run_id: str, rank: int) -> str:
    """The file's name. Raises BoardSchemaError for a run_id that is not a plain name."""
    if not _RUN_ID.fullmatch(run_id):
        raise BoardSchemaError(
            f"run_id {run_id!r}: expected 1 to 100 letters, digits, '.', '_' or '-', starting with a letter or digit"
        )
    return f"{run_id}-{rank}{SUFFIX}"
