"""Run the benchmarks that this machine can run, or the one that is named.

    python -m benchmarks [NAME [OPTIONS]]

Without a name: all of them, ``gpu`` only where there is a CUDA device. What follows a name goes to that benchmark.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("cpu", "watch", "agent", "faults", "store", "stress", "convergence", "promql", "gpu")


def main(arguments: list[str]) -> int:
    """Run each in a process of its own; the exit code of the worst."""
    name, options = (arguments[0], arguments[1:]) if arguments else (None, [])
    known = [one for one in NAMES if (HERE / f"{one}.py").exists()]
    if name is not None and name not in known:
        print(f"there is no benchmark {name!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    wanted = [name] if name else [one for one in known if one != "gpu" or has_gpu()]
    commands = ([sys.executable, "-m", f"benchmarks.{one}", *options] for one in wanted)
    return max(subprocess.run(command, cwd=HERE.parent, check=False).returncode for command in commands)


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
