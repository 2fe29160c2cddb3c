"""Training runs side by side, each a process of its own, that break and are repaired when the tests say so.

``python troubled_runs.py DIRECTORY [RUN[:RANK] ...]``, by default all of them: a file ``RUN.break`` in the directory
breaks the run of that name, ``RUN.repair`` repairs it. ``RUN.pid`` says which process it is. Ends when the directory is
gone.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import optwatch
from optwatch.cli.demo.resume import resume_as_fp32
from optwatch.optim import AdamW

PAUSE = 0.1  # seconds between steps
LEAK = 2 << 20  # bytes a step


class Run:
    """A small model that learns a fixed function of noise; a step every tenth of a second."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
        self.optimizer = AdamW(self.model.parameters(), lr=1e-4, state="int8")
        self.poison = False
        self.leaked: list[bytearray] = []
        self.saved: tuple[dict, dict] = ({}, {})

    def step(self) -> None:
        """One step."""
        batch = torch.randn(32, 64)
        loss = (self.model(batch) - batch.flip(1)).square().mean()
        loss.backward()
        if self.poison:
            self.model[0].weight.grad[0, 0] = torch.nan
        self.optimizer.step()
        self.optimizer.zero_grad()
        time.sleep(PAUSE)

    def save(self) -> None:
        """A checkpoint."""
        self.saved = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def load(self) -> None:
        """Back to it, through the optimizer's own loader."""
        self.model.load_state_dict(self.saved[0])
        self.optimizer.load_state_dict(self.saved[1])


def _nothing(run: Run) -> None:
    pass


def _poison(run: Run) -> None:
    run.poison = True


def _skip(run: Run) -> None:
    """Gradients that are not finite, which the optimizer keeps from the weights."""
    run.optimizer.nonfinite = "skip"
    run.poison = True


def _cure(run: Run) -> None:
    run.poison = False
    run.load()


def _leak(run: Run) -> None:
    run.leaked.append(bytearray(os.urandom(64)) * (LEAK // 64))


#: Run -> what breaks it, and whether again at each step; and what repairs it.
RUNS: dict[str, tuple[Callable[[Run], None], bool, Callable[[Run], None]]] = {
    "healthy": (_nothing, False, _nothing),
    "finished": (_nothing, False, _nothing),
    "promoted": (lambda run: resume_as_fp32(run.model, run.optimizer), False, Run.load),
    "poisoned": (_poison, False, _cure),
    "skipping": (_skip, False, _cure),
    "stalled": (_nothing, True, _nothing),
    "killed": (_nothing, False, _nothing),
    "leaking": (_leak, True, _nothing),
}


def _train(name: str, directory: Path) -> None:
    torch.set_num_threads(1)
    breaks, again, repairs = RUNS[name]
    run, broken = Run(), False
    with optwatch.watch(run.optimizer, model=run.model, run_id=name, every=5, agent=False):
        (directory / f"{name}.pid").write_text(str(os.getpid()))
        while directory.exists():
            if (directory / f"{name}.break").exists() and not (directory / f"{name}.repair").exists():
                if name == "finished":
                    return
                if not broken:
                    run.save()
                if again or not broken:
                    breaks(run)
                broken = True
            elif broken:
                repairs(run)
                broken = False
            if name == "stalled" and broken:
                time.sleep(PAUSE)
            else:
                run.step()


def _start(name: str, directory: Path) -> None:
    if os.fork() == 0:
        name, _, rank = name.partition(":")
        os.environ["RANK"] = rank or "0"
        _train(name, directory)
        # The interpreter's end says goodbye, as that of any script.
        sys.exit(0)


def main() -> None:
    """Start all runs, and the killed one again when it is repaired."""
    directory = Path(sys.argv[1])
    for name in sys.argv[2:] or RUNS:
        _start(name, directory)
    restarted = False
    while directory.exists():
        if not restarted and (directory / "killed.repair").exists():
            restarted = True
            _start("killed", directory)
        time.sleep(PAUSE)


if __name__ == "__main__":
    main()
