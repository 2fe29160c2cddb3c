"""Where boards live: a private directory in shared memory, per user; or one shared with a group."""

from __future__ import annotations

import contextlib
import grp
import os
import re
import stat
import tempfile
from pathlib import Path

from optwatch.board.errors import BoardDirectoryError, BoardSchemaError

SUFFIX = ".board"
ENVIRONMENT = "OPTWATCH_DIR"
GROUP = "OPTWATCH_GROUP"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Setgid: boards are the group's. Sticky: members cannot remove or replace each other's boards.
_SHARED = 0o3770


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
    writable: names in a shared /dev/shm can be squatted. A directory of mode 3770 of the group that
    ``OPTWATCH_GROUP`` names may be another user's.
    """
    path = Path.cwd() / path  # not resolved: a symlink is to be seen
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = os.lstat(path)
    except OSError as error:
        raise BoardDirectoryError(f"{path}: cannot be made: {error.strerror}; set {ENVIRONMENT}") from error
    if problem := _problem(path, status):
        raise BoardDirectoryError(f"{path}: {problem}; use another directory, for example with {ENVIRONMENT}")
    return path


def opted_in_group() -> int | None:
    """The group that ``OPTWATCH_GROUP`` names, by name or number. Raises BoardDirectoryError if there is none such."""
    name = os.environ.get(GROUP)
    if not name:
        return None
    if name.isdecimal():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise BoardDirectoryError(
            f"{GROUP}={name}: no such group; name one that exists or unset it"
        ) from None


def is_shared(directory: Path) -> bool:
    """Whether the directory is shared with the group that was opted in. Raises as `opted_in_group` does."""
    return _is_shared(os.lstat(directory), opted_in_group())


def may_serve(directory: Path) -> bool:
    """Whether an agent of this user can serve the directory: of a shared one only the owner can remove boards."""
    return not is_shared(directory) or os.lstat(directory).st_uid == os.geteuid()


def _is_shared(status: os.stat_result, group: int | None) -> bool:
    return stat.S_ISDIR(status.st_mode) and status.st_gid == group and stat.S_IMODE(status.st_mode) == _SHARED


def _problem(path: Path, status: os.stat_result) -> str | None:
    group = opted_in_group()
    expected = "700" if group is None else f"700, or {_SHARED:o} and group {group}"
    problem = None
    if stat.S_ISLNK(status.st_mode):
        problem = "is a symbolic link"
    elif not stat.S_ISDIR(status.st_mode):
        problem = "is not a directory"
    elif status.st_uid != os.geteuid() and not _is_shared(status, group):
        problem = f"belongs to user {status.st_uid}, not to {os.geteuid()}"
    elif status.st_mode & 0o022 and not _is_shared(status, group):
        problem = f"can be written by others (mode {stat.S_IMODE(status.st_mode):o}, expected {expected})"
    elif not os.access(path, os.W_OK | os.X_OK):
        problem = "is not writable"
    return problem


def board_name(run_id: str, rank: int) -> str:
    """The file's name. Raises BoardSchemaError for a run_id that is not a plain name."""
    if not _RUN_ID.fullmatch(run_id):
        raise BoardSchemaError(
            f"run_id {run_id!r}: expected 1 to 100 letters, digits, '.', '_' or '-', starting with a letter or digit"
        )
    return f"{run_id}-{rank}{SUFFIX}"
