"""What can be wrong with a board, as types.

Every error carries ``reason``, a short constant word. The agent counts skipped boards by it, so the set of
words is bounded by the number of classes here.
"""

from __future__ import annotations


class BoardError(Exception):
    """A board or its directory cannot be used."""

    reason = "error"


class BoardDirectoryError(BoardError):
    """The directory cannot hold boards: a symlink, somebody else's, open to others, or not writable."""

    reason = "directory"


class BoardSpaceError(BoardError):
    """The file system has no room for the preallocated file."""

    reason = "space"


class BoardBusyError(BoardError):
    """A living process already writes the board of this run and rank."""

    reason = "busy"


class BoardSchemaError(BoardError):
    """The schema is not valid, or its JSON does not describe one."""

    reason = "schema"


class BoardTooLargeError(BoardSchemaError):
    """The schema does not fit into the largest board."""

    reason = "too_large"


class BoardMissingError(BoardError):
    """The file is gone, is not a plain file, or belongs to somebody else."""

    reason = "missing"


class BoardMagicError(BoardError):
    """The file is not a board."""

    reason = "not_a_board"


class BoardVersionError(BoardError):
    """The board was written in another version of the layout."""

    reason = "version"


class BoardTruncatedError(BoardError):
    """The file is shorter or longer than its header says."""

    reason = "truncated"


class BoardCorruptError(BoardError):
    """A checksum does not match."""

    reason = "corrupt"


class BoardReadError(BoardError):
    """The operating system refused a read."""

    reason = "unreadable"
