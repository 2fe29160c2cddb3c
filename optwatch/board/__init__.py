"""Floor 0: the board, a ring file in shared memory through which a rank tells the agent what its steps did.

The bytes are described in `optwatch.board.layout`. Needs numpy and the standard library only.
"""

from optwatch.board.address import find_agent
from optwatch.board.directory import (
    ENVIRONMENT,
    SUFFIX,
    board_directory,
    board_name,
    is_shared,
    may_serve,
    secure_directory,
)
from optwatch.board.errors import (
    BoardBusyError,
    BoardCorruptError,
    BoardDirectoryError,
    BoardError,
    BoardMagicError,
    BoardMissingError,
    BoardReadError,
    BoardSchemaError,
    BoardSpaceError,
    BoardTooLargeError,
    BoardTruncatedError,
    BoardVersionError,
)
from optwatch.board.fold import Fold, apply_folds, fit, fold_to_groups
from optwatch.board.histogram import Histogram
from optwatch.board.layout import MAXIMUM_BYTES, State
from optwatch.board.reader import BoardReader, Live, Poll, Record
from optwatch.board.schema import HistogramSeries, Schema, Series, Table, TensorInfo
from optwatch.board.writer import BoardWriter, HistogramValues, Values

__all__ = [
    "ENVIRONMENT",
    "MAXIMUM_BYTES",
    "SUFFIX",
    "BoardBusyError",
    "BoardCorruptError",
    "BoardDirectoryError",
    "BoardError",
    "BoardMagicError",
    "BoardMissingError",
    "BoardReadError",
    "BoardReader",
    "BoardSchemaError",
    "BoardSpaceError",
    "BoardTooLargeError",
    "BoardTruncatedError",
    "BoardVersionError",
    "BoardWriter",
    "Fold",
    "Histogram",
    "HistogramSeries",
    "HistogramValues",
    "Live",
    "Poll",
    "Record",
    "Schema",
    "Series",
    "State",
    "Table",
    "TensorInfo",
    "Values",
    "apply_folds",
    "board_directory",
    "board_name",
    "find_agent",
    "fit",
    "fold_to_groups",
    "is_shared",
    "may_serve",
    "secure_directory",
]
