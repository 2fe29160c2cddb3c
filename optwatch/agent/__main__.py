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

from optwatch.agent.service import serve  # noqa: E402 - the environment comes first
from optwatch.agent.settings import Settings  # noqa: E402
from optwatch.board import BoardDirectoryError  # noqa: E402

_HELP = {
    "host": "address to bind to",
    "port": "first port to try; the next ones and then any free one follow",
    "interval": "seconds between polls of the boards",
    "grace": "seconds to serve the last values of a rank that ended",
    "series": "series of one rank at most",
    "device_interval": "seconds between samples of the GPUs",
    "device_limit": "seconds until a call of the GPU driver counts as hung",
    "exit_when_idle": "leave after so many seconds without boards",
}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and serve. Exit code 1: the directory or the address cannot be used."""
    parser = argparse.ArgumentParser("python -m optwatch.agent", description="Serve the boards of this node.")
    parser.add_argument("--dir", help="directory of the boards (default: the user's own in shared memory)")
    parser.add_argument("--nice", type=int, default=0, help="be this much nicer to other processes")
    for name, text in _HELP.items():
        default = getattr(Settings, name)
        kind = float if default is None else type(default)
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=kind, default=default, help=f"{text} (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        parser.error(f"--port {options.port}: expected a number of 0 to 65535; 0 takes any free port")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    if options.nice:
        with contextlib.suppress(OSError):
            os.nice(options.nice)
    try:
        serve(options.dir, Settings(**{name: getattr(options, name) for name in _HELP}))
    except (BoardDirectoryError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
