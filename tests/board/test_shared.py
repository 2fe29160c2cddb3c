"""Boards of several users: refused, unless both sides name the group with which a directory is shared."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import board_samples
from agent_process import agent, eventually, scrape
from board_samples import Feed, end, environment, schema
from optwatch.board import BoardDirectoryError, BoardMissingError, BoardReader, BoardWriter, secure_directory
from optwatch.board.directory import GROUP
from optwatch.hooks.launch import ensure_agent

ALICE, BOB, SERVICE, MEMBERS = 54321, 54322, 54323, 54330
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="platform: only root can be several users")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory as the documentation says, where other users can come to it."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    made = root / "boards"
    made.mkdir()
    os.chown(made, SERVICE, MEMBERS)
    made.chmod(0o3770)
    yield made
    shutil.rmtree(root)


def become(user: int) -> str:
    """Code for after the imports: modules may lie where only root can read."""
    return f"import os; os.setgroups([{MEMBERS}]); os.setgid({user}); os.setuid({user}); os.umask(0o77)"


def run_as(user: int, code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of that user, who is a member and opted in."""
    imports = (
        "import sys, board_samples; from optwatch.agent.service import serve; from optwatch.board import *"
    )
    ours = environment()
    ours["PYTHONPATH"] += os.pathsep + str(Path(board_samples.__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-c", f"{imports}; {become(user)}\n{code}", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ours, GROUP: str(MEMBERS)},
    )


def writer(user: int, directory: Path, run_id: str) -> subprocess.Popen[str]:
    """A user's rank, which has begun."""
    process = run_as(user, "board_samples._main(*sys.argv[1:])", directory, run_id, 0, 50, 12, 0)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise AssertionError(process.communicate()[1])
    return process


def test_symlinked_and_foreign_boards_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to a good board, a board of another user, also when a group is opted in that is not the board's."""
    path = tmp_path / "run-0.board"
    feed = Feed(BoardWriter.create(tmp_path, schema()))
    feed.publish()
    feed.writer.close()
    (tmp_path / "link-0.board").symlink_to(path)
    with pytest.raises(BoardMissingError, match="cannot be opened"):
        BoardReader(tmp_path / "link-0.board")
    BoardReader(path).close()
    os.chown(path, ALICE, ALICE)
    for group, mode, accepted in [
        ("", 0o600, False), (MEMBERS, 0o640, False), (ALICE, 0o640, True), (ALICE, 0o660, False),
        (ALICE, 0o646, False),
    ]:  # fmt: skip
        monkeypatch.setenv(GROUP, str(group))
        path.chmod(mode)
        if accepted:
            BoardReader(path).close()
        else:
            with pytest.raises(BoardMissingError, match="not a plain file of user 0"):
                BoardReader(path)


def test_only_the_opted_in_directory(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not without the variable, nor with another group or mode, nor through a link; what is private stays fine."""
    with pytest.raises(BoardDirectoryError, match=f"belongs to user {SERVICE}"):
        secure_directory(shared)
    monkeypatch.setenv(GROUP, str(MEMBERS))
    assert secure_directory(shared) == shared
    assert secure_directory(shared.parent / "own").stat().st_mode & 0o7777 == 0o700
    (shared.parent / "link").symlink_to(shared)
    with pytest.raises(BoardDirectoryError, match="symbolic link"):
        secure_directory(shared.parent / "link")
    for mode in (0o2770, 0o1770, 0o770, 0o3777, 0o3775):
        shared.chmod(mode)
        with pytest.raises(BoardDirectoryError, match="belongs to user"):
            secure_directory(shared)
    os.chown(shared, 0, MEMBERS)
    shared.chmod(0o2770)
    with pytest.raises(BoardDirectoryError, match=f"mode 2770, expected 700, or 3770 and group {MEMBERS}"):
        secure_directory(shared)
    shared.chmod(0o3770)
    monkeypatch.setenv(GROUP, str(ALICE))
    with pytest.raises(BoardDirectoryError, match="mode 3770, expected 700"):
        secure_directory(shared)
    monkeypatch.setenv(GROUP, "no-such-group")
    with pytest.raises(BoardDirectoryError, match="OPTWATCH_GROUP=no-such-group: no such group"):
        secure_directory(shared)


def test_one_agent_serves_all_members(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of two users are served by the owner's agent, which removes the boards of those that ended."""
    ranks = {name: writer(user, shared, name) for name, user in (("alice", ALICE), ("bob", BOB))}
    monkeypatch.setenv(GROUP, str(MEMBERS))
    log = shared / "agent-test.log"
    log.touch()
    try:
        for name, user in (("alice", ALICE), ("bob", BOB)):
            status = (shared / f"{name}-0.board").stat()
            assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (user, MEMBERS, 0o640)
        assert ensure_agent(shared) is None  # not the owner's: none is started
        assert not (shared / "agent.starting").exists()
        before = f"import optwatch.agent.service, optwatch.agent.__main__; {become(SERVICE)}"
        with agent(shared, "--grace", "0.5", "--store", "off", before=before) as (url, _):
            page = scrape(url)
            assert page.one("optwatch_rank_up", run_id="alice") == 1
            assert page.one("optwatch_rank_up", run_id="bob") == 1
            told = run_as(BOB, "print(find_agent(sys.argv[1]))", shared)
            assert told.communicate()[0] == f"{url}\n"
            theft = run_as(
                BOB, "import pathlib; pathlib.Path(sys.argv[1]).unlink()", shared / "alice-0.board"
            )
            assert "PermissionError" in theft.communicate()[1]
            end(ranks["alice"])

            def gone() -> None:
                assert not (shared / "alice-0.board").exists()
                assert scrape(url).all("optwatch_rank_up", run_id="alice") == []

            eventually(gone)
            assert scrape(url).one("optwatch_rank_up", run_id="bob") == 1
    finally:
        for process in ranks.values():
            end(process)


def test_only_the_owner_is_the_agent(shared: Path) -> None:
    """A member's agent could not remove what ended: it is told so in one line."""
    done = run_as(ALICE, "serve(sys.argv[1])", shared)
    assert f"is shared; its agent runs as its owner, user {SERVICE}" in done.communicate()[1]
