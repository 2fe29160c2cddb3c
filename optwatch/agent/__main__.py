"""``python -m optwatch.agent``: run the agent in the foreground."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys

# numpy's linear algebra would start a thread, with its own memory, per core; the agent adds short columns.
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from optwatch.agent.server import DEFAULT_PORT  # noqa: E402 - the environment comes first
from optwatch.agent.service import DEFAULT_GRACE, DEFAULT_INTERVAL, DEFAULT_SERIES, serve  # noqa: E402
from optwatch.board import BoardDirectoryError  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and serve. Exit code 1: the directory or the address cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m optwatch.agent", description="Serve the boards of this node."
    )
    parser.add_argument("--dir", help="directory of the boards (default: the user's own in shared memory)")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="first port to try (default: %(default)s)"
    )
    parser.add_argument("--interval", type=float, default=DEFAULT_INTERVAL, help="seconds between polls")
    parser.add_argument("--grace", type=float, default=DEFAULT_GRACE, help="seconds to serve an ended rank")
    parser.add_argument("--series", type=int, default=DEFAULT_SERIES, help="series of one rank at most")
    parser.add_argument(
        "--exit-when-idle", type=float, metavar="SECONDS", help="leave after so long without boards"
    )
    parser.add_argument("--nice", type=int, default=0, help="be this much nicer to other processes")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    if options.nice:
        with contextlib.suppress(OSError):
            os.nice(options.nice)
    try:
        serve(
            options.dir,
            host=options.host,
            port=options.port,
            interval=options.interval,
            grace=options.grace,
            series_cap=options.series,
            exit_when_idle=options.exit_when_idle,
        )
    except (BoardDirectoryError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
