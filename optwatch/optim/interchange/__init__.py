"""Optimizer state of other libraries, read and written as they store it: one file for each library.

A library's file is a :class:`Peer`. Reading turns the state of one parameter into ours: into buffers of one of our
formats where the library's are the same bytes (``int8_dynamic`` and ``fp8``), into fp32 values otherwise. Loading then
converts these to what ``state=`` asks for. No library has to be installed to read its checkpoints, except that
unpickling torchao's takes torchao.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from torch import Tensor

from optwatch.optim.interchange import bitsandbytes, flashoptim, torchao
from optwatch.optim.interchange.source import Source
from optwatch.optim.interchange.torch import torch_state_dict
from optwatch.rules import Rule

__all__ = ["EXPORTS", "PEERS", "Peer", "export", "peer_of"]


class Peer(Protocol):
    """What a library's file has."""

    NAME: str

    @staticmethod
    def wrote(state_dict: Mapping[str, Any]) -> bool:
        """Whether this library made the checkpoint."""

    @staticmethod
    def options(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a saved parameter group by the names of ``own``, our group."""

    @staticmethod
    def read(saved: Mapping[str, Any], rule: Rule, param: Tensor) -> dict[str, Any]:
        """One parameter's state by our keys; a ``ValueError`` says what was found and what was expected."""


PEERS = tuple(cast(Peer, module) for module in (bitsandbytes, torchao, flashoptim))

#: Whose layout :func:`export` can write.
EXPORTS: dict[str, Callable[[Source], dict[str, Any]]] = {
    "torch": torch_state_dict,
    "bitsandbytes": bitsandbytes.state_dict,
}


def peer_of(state_dict: Mapping[str, Any]) -> Peer | None:
    """The library that made a checkpoint; None for our own and for torch.optim's, which has the same keys."""
    return next((peer for peer in PEERS if peer.wrote(state_dict)), None)


def export(optimizer: Source, to: str) -> dict[str, Any]:
    """See :meth:`optwatch.optim.Optimizer.export_state_dict`."""
    if to not in EXPORTS:
        raise ValueError(f"cannot export to {to!r}: use one of {', '.join(map(repr, EXPORTS))}")
    return EXPORTS[to](optimizer)
