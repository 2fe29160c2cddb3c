"""``watch()``: put the monitor around a training loop."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch

from optwatch.board.run import run_facts
from optwatch.codecs import state_format
from optwatch.hooks.distributed import model_replicas, rank_facts
from optwatch.hooks.groups import GroupBy, Grouping, by_depth, grouping
from optwatch.hooks.parts import NO_SAMPLING, Sampling
from optwatch.hooks.session import Watch, unwrapped

#: One of so many steps sums the full statistics. Such a step takes about half as long again on a CPU, so one in
#: fifty costs about one per cent on average.
DEFAULT_EVERY = 50

_newest: Watch | None = None


def _say(message: str) -> None:
    # A filter may turn warnings into errors: then this one goes to stderr.
    try:
        warnings.warn(f"optwatch: {message}", RuntimeWarning, stacklevel=4)
    except RuntimeWarning:
        sys.stderr.write(f"optwatch: {message}\n")


def watch(
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
    model: torch.nn.Module | None = None,
    *,
    run_id: str | None = None,
    every: int = DEFAULT_EVERY,
    replicas: int | None = None,
    groups: GroupBy = None,
    directory: str | os.PathLike[str] | None = None,
    agent: bool = True,
    shadow: float = 0.0,
    what_if: str | Sequence[str] = (),
) -> Watch:
    """Publish what the optimizer does, step by step, until :meth:`Watch.close` or the end of the process.

    Args:
        optimizer: one or several; of optwatch's own the statistics of the kernel, of any other its bytes, durations
            and gradients, and on sampled steps the moments that an adapter can read.
        model: gives the tensors their names, and through them their groups (by depth).
        run_id: names the run on every series; the same on all ranks. By default the launcher's, else made up.
        every: one of so many steps sums the full statistics; all sum norms of gradient and update.
        replicas: the number of ranks that hold the same tensors, by which sums over ranks are to be divided; by
            default what the placement of DTensors says, else the ranks of a DistributedDataParallel model, else 1.
        groups: by what tensors are grouped: a regular expression (what it matches in the name is the group) or a
            function of the name; at most 24, the rest is ``other``. By default six, by depth.
        directory: where the board lies; by default in shared memory, private to the user.
        agent: whether to start the node's agent if none runs.
        shadow: the share of blocks of quantised state, such as 0.01, of which an fp32 copy is kept and stepped with
            the same gradients, so that the error that *accumulates* in moments and update can be shown.
        what_if: storage formats, such as ``"int4"``, whose error is shown on the same blocks.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``run_id``, ``every``, ``replicas``, ``groups``, ``shadow`` or ``what_if`` is not valid.

    Nothing raises after this has returned: what goes wrong in watching ends in one warning, and training goes on.
    """
    single = isinstance(optimizer, torch.optim.Optimizer) or not isinstance(optimizer, Iterable)
    optimizers = [unwrapped(one) for one in ([optimizer] if single else cast("Iterable[object]", optimizer))]
    for name, value in (("every", every), ("replicas", replicas or 1)):
        if value < 1 or value != int(value):
            raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
    sampling = sampling_of(shadow, what_if)
    facts = run_facts(run_id)
    return begin(
        optimizers,
        model,
        facts,
        every,
        replicas,
        directory,
        agent,
        groups=grouping(groups),
        sampling=sampling,
    )


def sampling_of(shadow: float, what_if: str | Sequence[str]) -> Sampling:
    """What these arguments of :func:`watch` ask for. Raises ValueError."""
    names = (what_if,) if isinstance(what_if, str) else tuple(what_if)
    if not 0 <= shadow <= 1:
        raise ValueError(f"shadow={shadow!r}: expected a share of the blocks, from 0 to 1")
    for name in names:
        state_format(name)
    if len(set(names)) != len(names) or (names and not shadow):
        raise ValueError(f"what_if={what_if!r}: expected each format once, and a share of blocks for shadow=")
    return Sampling(float(shadow), names)


def begin(
    optimizers: Sequence[torch.optim.Optimizer], model: torch.nn.Module | None, facts: Mapping[str, object], every: int,
    replicas: int | None, directory: str | os.PathLike[str] | None, agent: bool, say: Callable[[str], None] = _say,
    automatic: bool = False, groups: Grouping = by_depth, sampling: Sampling = NO_SAMPLING,
) -> Watch:  # fmt: skip
    """Make the watch that :func:`current` then returns; ``say`` is told in a line what goes wrong.

    One that nobody asked for (``automatic``) makes way for one that somebody did.
    """
    global _newest
    if (before := current()) is not None and before.automatic:
        before.close()
    facts = {**facts, **rank_facts(), "replicas": replicas or model_replicas(model)}
    made = Watch(model, facts, every, replicas, directory, say, groups, sampling)
    made.automatic = automatic
    made.add(*optimizers)
    made.start(agent)
    _newest = made
    return made


def current() -> Watch | None:
    """The newest watch of this process that is still publishing."""
    return _newest if _newest is not None and _newest.active else None
