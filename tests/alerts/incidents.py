"""Runs in which state silently became larger, as it happened to others, beside the runs in which it did not.

Each incident trains twice, good and bad, and leaves the boards of both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn

import optwatch
from optwatch.optim import AdamW

ELEMENTS = (64, 80)  # 5,120: one tensor is quantised, its half is not


class Incident(NamedTuple):
    """What happened, the metric that shows it at the first step, and how."""

    what: str
    good: Callable[[Path], None]
    bad: Callable[[Path], None]
    optimizer: str
    #: Storage type that the state has in the good run, and in the bad one.
    dtypes: tuple[str, str]
    alert: str


@contextmanager
def rank(number: int) -> Iterator[None]:
    """Be this rank of a job."""
    before = {name: os.environ.get(name) for name in ("RANK", "JOB_NAME")}
    os.environ.update(RANK=str(number), JOB_NAME="nightly")
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def step(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """One step on a gradient that is not zero."""
    param.grad = torch.linspace(-1, 1, param.numel()).view(param.shape).to(param.dtype)
    optimizer.step()


def _run(
    directory: Path,
    run_id: str,
    make: Callable[[nn.Parameter], torch.optim.Optimizer],
    rows: int = ELEMENTS[0],
    resume: Callable[[nn.Parameter, torch.optim.Optimizer], None] | None = None,
    number: int = 0,
) -> None:
    param = nn.Parameter(torch.zeros(rows, ELEMENTS[1], dtype=torch.float32))
    optimizer = make(param)
    if resume is not None:
        resume(param, optimizer)
    with rank(number), optwatch.watch(optimizer, run_id=run_id, directory=directory, agent=False):
        step(param, optimizer)


def _int8(param: nn.Parameter) -> torch.optim.Optimizer:
    return AdamW([param], state="int8")


def _promoted(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """Resume with every slot decoded to fp32, as a loader does that does not know the format."""
    assert isinstance(optimizer, AdamW)
    step(param, optimizer)
    slots = optimizer.dequantized_state(param)
    count = optimizer.state[param]["step"]
    optimizer.state[param].clear()
    optimizer.state[param].update(slots, step=count)


def _bf16(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """Momentum in bf16 under fp32 weights, put there by hand as training frameworks do."""
    step(param, optimizer)
    optimizer.state[param]["momentum_buffer"] = optimizer.state[param]["momentum_buffer"].bfloat16()


def _bf16_resumed(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """torch.optim's own load_state_dict casts to the dtype of the weights."""
    _bf16(param, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())


def _sgd(param: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.SGD([param], momentum=0.9)


def _both_ranks(rows: int) -> Callable[[Path, str], None]:
    def run(directory: Path, run_id: str) -> None:
        for number in range(2):
            _run(directory, run_id, lambda param: AdamW8bit([param]), rows, number=number)

    return run


INCIDENTS = (
    Incident(
        "a resume promotes int8 state to fp32",
        lambda directory: _run(directory, "good", _int8),
        lambda directory: _run(directory, "bad", _int8, resume=_promoted),
        "AdamW", ("int8", "float32"), "StateBytesUnexpected",
    ),
    Incident(
        "a resume promotes bf16 state to fp32",
        lambda directory: _run(directory, "good", _sgd, resume=_bf16),
        lambda directory: _run(directory, "bad", _sgd, resume=_bf16_resumed),
        "SGD", ("bfloat16", "float32"), "StateBytesRegression",
    ),
    Incident(
        "an 8-bit optimizer runs in fp32",
        lambda directory: _run(directory, "good", lambda p: AdamW8bit([p])),
        lambda directory: _run(directory, "bad", lambda p: AdamW8bit([p], min_8bit_size=1 << 30)),
        "AdamW8bit", ("uint8", "float32"), "StateBytesRegression",
    ),
    Incident(
        "the storage type depends on the sharding",
        lambda directory: _both_ranks(ELEMENTS[0])(directory, "good"),
        lambda directory: _both_ranks(ELEMENTS[0] // 2)(directory, "bad"),
        "AdamW8bit", ("uint8", "float32"), "StateBytesRegression",
    ),
)  # fmt: skip
