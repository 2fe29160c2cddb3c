"""Watching every optimizer of a process that knows nothing of it: what ``optwatch run`` does inside.

The script's output, exit code and signals stay as they are, so nothing here prints, warns or raises; what goes wrong
is written to ``run.log`` beside the boards.
"""

from __future__ import annotations

import gc
import json
import os
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch

from optwatch.board import board_directory, board_name
from optwatch.board.run import run_facts
from optwatch.hooks.distributed import rank_facts
from optwatch.hooks.session import Watch, uncompiled
from optwatch.hooks.watch import DEFAULT_EVERY, begin, current

#: Settings of ``optwatch run`` for the processes under it, in JSON: "every", "agent".
ENVIRONMENT = "OPTWATCH_RUN"
LOG = "run.log"

_seen: weakref.WeakKeyDictionary[torch.optim.Optimizer, Watch] = weakref.WeakKeyDictionary()
_failed_in: int | None = None  # the process in which watching has ended before its time


def _before_step(optimizer: torch.optim.Optimizer) -> None:
    watch = current()
    if (watch is not None and _seen.get(optimizer) is watch) or _failed_in == os.getpid():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _take(optimizer, watch)
        except Exception as error:  # noqa: BLE001 - law: watching never raises into step()
            _fail(f"{type(error).__name__}: {error}")


#: Called before each step of any optimizer; watches it from this very step on. No compiled step takes it in.
before_step = uncompiled(_before_step)


def _take(optimizer: torch.optim.Optimizer, watch: Watch | None) -> None:
    if watch is None:
        if _made_here():
            _fail("watching ended")  # its own reason has been noted
            return
        watch = _begin(optimizer)
    elif not watch.watches(optimizer):  # of the script's own watch() too: this was asked for every optimizer
        watch.add(optimizer)
    _seen[optimizer] = watch


def _made_here() -> bool:
    """Whether this process had a watch of ours that ended by itself."""
    return any(one.automatic and one.pid == os.getpid() and not one.closed for one in set(_seen.values()))


def _begin(optimizer: torch.optim.Optimizer) -> Watch:
    settings: dict[str, Any] = json.loads(os.environ.get(ENVIRONMENT, "{}"))
    facts = {**run_facts(None), **rank_facts()}
    run_id, rank = str(facts["run_id"]), int(str(facts["rank"]))
    directory = board_directory()
    launched = int(str(facts["world_size"])) > 1
    if not launched and (directory / board_name(run_id, rank)).exists():
        # A second process of the same script: a fork, a sweep. Its board must not take the other's place.
        facts["run_id"] = f"{run_id[:68]}-{os.getpid()}"
    return begin(
        [optimizer],
        find_model(optimizer),
        facts,
        int(settings.get("every", DEFAULT_EVERY)),
        None,
        directory,
        bool(settings.get("agent", True)),
        _note,
        automatic=True,
    )


def find_model(optimizer: torch.optim.Optimizer) -> torch.nn.Module | None:
    """The outermost module that holds the optimizer's parameters: it gives them their names.

    Looks through all objects that Python knows, which takes about a tenth of a second, once.
    """
    wanted = {id(param) for group in optimizer.param_groups for param in group["params"]}
    best, most = None, (0, 0)
    # By type, never isinstance: a lazy proxy would load what it stands for.
    for module in [one for one in gc.get_objects() if issubclass(type(one), torch.nn.Module)]:
        held = sum(id(param) in wanted for param in module.parameters())
        size = (held, sum(1 for _ in module.modules()))
        if held and size > most:
            best, most = module, size
    return best


def _fail(message: str) -> None:
    global _failed_in
    _failed_in = os.getpid()
    _note(message)


def _note(message: str) -> None:
    """Append a line to the log; the script's own output is not ours."""
    try:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with Path(board_directory(), LOG).open("a", encoding="utf-8") as log:
            log.write(f"{stamp} process {os.getpid()}: {message}\n")
    except Exception:  # noqa: BLE001 - then there is no place to say it
        return
