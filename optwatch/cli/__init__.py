"""The ``optwatch`` command: ``demo``, ``top``, ``agent``, ``run``, ``baseline`` and ``check``."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (by default the process's own) and return its exit code.

    0 is success, 1 something that could not be done, 2 an option or argument that makes no sense, 130 an
    interruption from the keyboard. Errors are one line on stderr, without a traceback.
    """
    from optwatch.cli.app import run  # noqa: PLC0415 - `import optwatch.cli` should cost nothing

    return run(arguments)
