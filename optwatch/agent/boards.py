"""All boards of a directory: finding, following, forgetting."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from optwatch.agent.rank import Rank
from optwatch.board import SUFFIX, BoardError

log = logging.getLogger("optwatch.agent")

_LEFTOVER_SECONDS = 60.0  # a writer takes milliseconds from its temporary file to the final name


class Boards:
    """The ranks of a directory, by file name.

    Args:
        directory: where the boards are.
        grace: seconds for which the last values of a rank that ended are kept; then its file is removed.
        tidy: whether to remove files at all; only the one agent of the directory may.
    """

    def __init__(self, directory: Path, grace: float, tidy: bool = True) -> None:
        self.directory, self.grace, self._tidy = directory, grace, tidy
        self.ranks: dict[str, Rank] = {}
        self.skipped: Counter[str] = Counter()  # reason -> boards
        self._unreadable = ""  # why the directory cannot be read, said once
        self._bad: dict[str, tuple[int, int, int]] = {}  # name -> what the skipped file looked like

    @property
    def living(self) -> int:
        """Number of ranks whose process lives."""
        return sum(rank.alive for rank in self.ranks.values())

    def poll(self) -> None:
        """Look for new boards, read all, let go of those whose time is over."""
        names = self._scan()
        for name in sorted(names - self.ranks.keys()):
            self._open(name)
        for name, rank in list(self.ranks.items()):
            before = rank.problem
            rank.poll()
            if rank.problem is not None and (before is None or before.reason != rank.problem.reason):
                self._skip(name, rank.problem)
            if self._over(rank):
                del self.ranks[name]

    def close(self) -> None:
        """Let go of all boards; the files stay."""
        for rank in self.ranks.values():
            rank.close()
        self.ranks.clear()

    def _scan(self) -> set[str]:
        names = set()
        for entry in self._entries():
            if entry.name.endswith(SUFFIX) and not entry.name.startswith("."):
                names.add(entry.name)
            elif (
                self._tidy
                and entry.name.startswith(".")
                and f"{SUFFIX}." in entry.name
                and entry.name.endswith(".tmp")
            ):
                self._sweep(entry)
        self._bad = {name: look for name, look in self._bad.items() if name in names}
        return names

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        problem = ""
        try:
            with os.scandir(self.directory) as entries:
                yield from entries
        except OSError as error:
            problem = error.strerror or str(error)
        if problem and problem != self._unreadable:
            log.warning("%s: %s; the boards that are open are served on", self.directory, problem)
        self._unreadable = problem

    def _sweep(self, entry: os.DirEntry[str]) -> None:
        """Remove what a writer killed between making and renaming its file left behind."""
        try:
            if time.time() - entry.stat(follow_symlinks=False).st_mtime > _LEFTOVER_SECONDS:
                Path(entry.path).unlink()
        except OSError:
            return

    def _open(self, name: str) -> None:
        path = self.directory / name
        look = _look(path)
        if look is None or self._bad.get(name) == look:
            return
        try:
            self.ranks[name] = Rank(path)
        except BoardError as error:
            self._bad[name] = look
            self._skip(name, error)

    def _skip(self, name: str, error: BoardError) -> None:
        self.skipped[error.reason] += 1
        log.warning("board %s skipped (%s): %s", name, error.reason, error)

    def _over(self, rank: Rank) -> bool:
        """Whether the rank's time is over; if so its file is removed."""
        if rank.ended is None or time.monotonic() - rank.ended < self.grace:
            return False
        rank.remove() if self._tidy else rank.close()
        return True


def _look(path: Path) -> tuple[int, int, int] | None:
    """What tells whether a skipped file was replaced. Not its time: a living writer of another version changes it."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size
