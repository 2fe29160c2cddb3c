"""``optwatch run``: become another command, whose optimizers are watched."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import click

import optwatch.integrations
from optwatch.board import ENVIRONMENT as DIRECTORY
from optwatch.board import BoardDirectoryError, board_directory
from optwatch.board.run import run_facts

#: As `optwatch.integrations.every_optimizer` reads it; not imported from there, for that would load torch.
SETTINGS = "OPTWATCH_RUN"


class LaunchError(click.ClickException):
    """The command cannot be run."""

    exit_code = 126  # as a shell's


class NotFoundError(LaunchError):
    """There is no such command."""

    exit_code = 127


def run_command(
    command: Sequence[str], *, every: int, run_id: str | None, directory: str | None, agent: bool
) -> None:
    """Replace this process with ``command``: exit code, signals and terminal are then its own. Raises LaunchError."""
    if directory == "":
        raise click.UsageError("--dir is empty: expected a directory")
    if not command[0]:
        raise NotFoundError("the command is empty: expected a program and its arguments")
    if directory is not None:
        os.environ[DIRECTORY] = str(Path.cwd() / directory)
    try:
        board_directory()
        facts = run_facts(run_id)
    except (BoardDirectoryError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    environment = {
        **os.environ,
        "OPTWATCH_RUN_ID": str(facts["run_id"]),  # one for all ranks that the command starts
        SETTINGS: json.dumps({"every": every, "agent": agent, "begun": time.time()}),
    }
    autostart = str(Path(optwatch.integrations.__path__[0], "autostart"))
    # Never an empty entry: Python takes it for the working directory.
    entries = [autostart, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(entries)
    try:
        os.execvpe(command[0], list(command), environment)  # noqa: S606 - no shell is the point
    except FileNotFoundError as error:
        raise NotFoundError(f"{command[0]!r}: command not found") from error
    except OSError as error:
        raise LaunchError(f"{command[0]!r} cannot be run: {(error.strerror or 'error').lower()}") from error
