"""Where stored runs lie, and how one is found by name."""

from __future__ import annotations

import os
from pathlib import Path

from optwatch.exporters.store.runfile import StoreError

SUFFIX = ".sqlite"
ENVIRONMENT = "OPTWATCH_STORE"
OFF = "off"


def store_directory() -> Path | None:
    """Directory of this user's stored runs: ``OPTWATCH_STORE``, else a place in the user's state.

    None if that is "off", or if this user has no home.
    """
    said = os.environ.get(ENVIRONMENT)
    if said == OFF:
        return None
    if said:
        return Path(said)
    state = os.environ.get("XDG_STATE_HOME")
    try:
        return (Path(state) if state else Path.home() / ".local" / "state") / "optwatch"
    except RuntimeError:
        return None


def stored_runs(directory: Path) -> list[Path]:
    """The stored runs of a directory, the newest first."""
    return sorted(
        directory.glob(f"*{SUFFIX}"), key=lambda path: (path.stat().st_mtime, path.name), reverse=True
    )


def find_run(name: str | None) -> Path:
    """The file of a run: by path, by run id, by the beginning of one, or (None) the newest.

    Raises:
        StoreError: there is none, or several begin so; the message lists what there is.
    """
    if name is not None and (name.endswith(SUFFIX) or os.sep in name):
        if not Path(name).is_file():
            raise StoreError(
                f"{name}: there is no such file; expected a run id or a {SUFFIX} file of the local store"
            )
        return Path(name)
    directory = store_directory()
    if directory is None:
        raise StoreError(f"the local store is off; name the file of the run, or set {ENVIRONMENT}")
    runs = stored_runs(directory) if directory.is_dir() else []
    if not runs:
        raise StoreError(f"no runs are stored in {directory}; name a {SUFFIX} file, or set {ENVIRONMENT}")
    if name is None:
        return runs[0]
    exact = [run for run in runs if run.stem == name]
    found = exact or [run for run in runs if run.stem.startswith(name)]
    if len(found) == 1:
        return found[0]
    several = f"several runs begin with {name!r}" if found else f"no run {name!r}"
    shown = ", ".join(run.stem for run in (found or runs)[:5])
    raise StoreError(f"{several} in {directory}; there {'are' if len(found or runs) > 1 else 'is'}: {shown}")
