"""Parameters that are DTensors: plans step the local piece, and state lies in ``optimizer.state`` placed like it.

So sharded checkpoints, which know DTensors, save every rank's piece. A buffer with a value for each element has the
parameter's placements. One with a value for each block (or packed codes) is a vector of the pieces of all shards, each
piece as long as the largest shard's, since DTensor cuts a vector into equal parts. Blocks follow the local piece: one
that a shard boundary cuts has a scale on either side.

The format of a slot goes by the size of the whole parameter: it must not depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from optwatch.codecs import FORMATS

State = MutableMapping[str, Any]


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor; without importing torch.distributed."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "placements")


def is_cut(tensor: Tensor) -> bool:
    """Whether this rank holds but a piece of a tensor, or terms of a sum, so that a norm of it is none of the whole."""
    if not is_sharded(tensor):
        return False
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    placements = enumerate(tensor.placements)  # type: ignore[attr-defined]
    return any(mesh.size(dim) > 1 and not place.is_replicate() for dim, place in placements)


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The piece of a tensor that this rank holds: the tensor itself unless it is a DTensor. No copy."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_state(param: Tensor, state: State) -> State:
    """The state of ``param`` as plain tensors for its local piece; writing to it writes to ``state``."""
    return _LocalState(param, state) if is_sharded(param) else state


def placed_like(param: Tensor, piece: Tensor) -> Tensor:
    """``piece``, of the shape of the local piece of ``param``, as the same part of a tensor of its whole shape."""
    if not is_sharded(param):
        return piece
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - loads a second of modules that few runs need

    placed: Tensor = DTensor.from_local(
        piece, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()  # type: ignore[attr-defined]
    )  # fmt: skip
    return placed


def shard_number(param: Tensor) -> int:
    """Which of the shards of ``param`` this rank holds; replicas of a shard have the same number, others 0."""
    if not is_sharded(param):
        return 0
    mesh, number = param.device_mesh, 0  # type: ignore[attr-defined]
    for dim, placement in enumerate(param.placements):  # type: ignore[attr-defined]
        if placement.is_shard():
            number = number * mesh.size(dim) + mesh.get_local_rank(dim)
    return number


def largest_shard(param: Tensor) -> int:
    """Elements of the largest shard of ``param``, which the others' vectors are as long as."""
    if not is_sharded(param):
        return param.numel()
    sizes = list(param.shape)
    for dim, place in enumerate(param.placements):  # type: ignore[attr-defined]
        if place.is_shard():
            sizes[place.dim] = -(-sizes[place.dim] // param.device_mesh.size(dim))  # type: ignore[attr-defined]
    return math.prod(sizes)


class _LocalState(MutableMapping[str, Any]):
    """See `local_state`."""

    def __init__(self, param: Tensor, state: State) -> None:
        self._param, self._state = param, state
        self._numel = local(param).numel()
        self._shape = local(param).shape
        self._largest = largest_shard(param)
        self._pieces: dict[str, tuple[Tensor, Tensor]] = {}  # key -> what the state holds, its piece

    def __getitem__(self, key: str) -> Any:
        held = self._state[key]
        if not is_sharded(held):
            return held
        known = self._pieces.get(key)
        if known is None or known[0] is not held:
            self._pieces[key] = known = held, self._piece(key, held)
        return known[1]

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(value, Tensor) or not value.dim():
            self._state[key] = value
            return
        piece = value
        if value.shape == self._shape:
            self._state[key] = placed_like(self._param, value)
        else:
            self._state[key], piece = self._vector(value.flatten(), self._longest(value))
        self._pieces[key] = self._state[key], piece

    def __delitem__(self, key: str) -> None:
        del self._state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    @property
    def _shards(self) -> int:
        mesh = self._param.device_mesh  # type: ignore[attr-defined]
        placements = self._param.placements  # type: ignore[attr-defined]
        return math.prod(mesh.size(i) for i, place in enumerate(placements) if place.is_shard())

    def _longest(self, piece: Tensor) -> int:
        """How long a vector that is as long as ``piece`` here is for the largest shard."""
        if self._largest == self._numel:
            return piece.numel()
        return next(longest for longest, here in self._lengths(piece.dtype) if here == piece.numel())

    def _lengths(self, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
        """Lengths that a vector can have for the largest shard and here, by every format that has such a buffer."""
        for codecs in FORMATS.values():
            for codec in codecs.values():
                for buffer in codec.buffers:
                    if buffer.dtype == dtype:
                        yield codec.length(buffer, self._largest), codec.length(buffer, self._numel)

    def _vector(self, piece: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """A vector of all shards' pieces, and this rank's as a view of it."""
        from torch.distributed.tensor import DTensor, Replicate, Shard  # noqa: PLC0415 - see placed_like()

        padded = piece
        if longest != piece.numel():
            padded = piece.new_zeros(longest)
            padded[: piece.numel()] = piece
        placements = [Shard(0) if place.is_shard() else Replicate() for place in self._param.placements]  # type: ignore[attr-defined]
        vector: Tensor = DTensor.from_local(
            padded, self._param.device_mesh, placements,  # type: ignore[attr-defined]
            run_check=False, shape=torch.Size([longest * self._shards]), stride=(1,),
        )  # fmt: skip
        return vector, local(vector)[: piece.numel()]

    def _piece(self, key: str, held: Tensor) -> Tensor:
        """This rank's piece of what a checkpoint brought."""
        piece = local(held)
        if held.shape == self._param.shape or self._largest == self._numel:
            return piece
        for longest, here in self._lengths(piece.dtype):
            if longest == piece.numel():
                return piece[:here]
        raise ValueError(f"{key!r} has {piece.numel()} values on this rank, which fits no format's blocks")
