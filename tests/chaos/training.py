"""A training process to be tormented: it imports torch once and forks a child for each job it is given.

A job is a line of JSON on stdin. The child trains to half, makes a file ``half``, waits for a file ``go``, does what
the job says (``then``), trains on, and writes a digest of weights and state to ``result``.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from optwatch.hooks import watch
from optwatch.optim import AdamW

HALF, END = 20, 120


def train(job: dict[str, Any]) -> None:
    """The run. Whatever happens to what watches it, its arithmetic is the same."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64))
    optimizer = AdamW(model.parameters(), lr=1e-2, state="int8")
    run = None
    if job["watch"]:
        run = watch(optimizer, model, run_id="run", every=10, directory=job["boards"], agent=False)
    for step in range(1, END + 1):
        inputs = torch.randn(8, 64)
        loss = (model(inputs) - inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if run is not None:
            run.log(loss=loss)
        if step == HALF:
            meet(Path(job["folder"]))
            ACTIONS.get(job["then"], _nothing)(run, optimizer)
    digest = hashlib.sha256()
    for tensor in (*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())):
        digest.update(tensor.detach().flatten().view(torch.uint8).numpy().tobytes())
    # Of a board that can no longer be written nothing is expected; of this file it is.
    Path(job["folder"], "result").write_text(digest.hexdigest())
    if job["then"] == "stay":
        time.sleep(60)


def meet(folder: Path) -> None:
    """Wait for the test."""
    (folder / "half").touch()
    while not (folder / "go").exists():
        time.sleep(0.005)


def _nothing(*_: object) -> None:
    pass


def _new_generation(run: Any, _: object) -> None:
    run.log(accuracy=0.5)


def _no_room(*_: object) -> None:
    # The digest's file is shorter than that, every record of the board lies beyond it.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def _fork(_: object, optimizer: torch.optim.Optimizer) -> None:
    child = os.fork()
    if not child:
        optimizer.step()  # as a worker that inherited the optimizer might
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0


def _clock(hours: float) -> Any:
    def turn(*_: object) -> None:
        real = time.time
        time.time = lambda: real() + 3600 * hours

    return turn


def _raise(*_: object) -> None:
    raise RuntimeError("the training script's own mistake")


ACTIONS = {
    "log something new": _new_generation,
    "run out of room": _no_room,
    "fork": _fork,
    "clock forward": _clock(24),
    "clock back": _clock(-24),
    "exit": lambda *_: sys.exit(0),
    "exit at once": lambda *_: os._exit(3),
    "raise": _raise,
    "sigterm": lambda *_: os.kill(os.getpid(), signal.SIGTERM),
}


def main() -> None:
    """Serve jobs until stdin ends; answers each with its process id, and says when it has ended."""
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            log = os.open(f"{job['folder']}/training.log", os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            train(job)
            return
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
