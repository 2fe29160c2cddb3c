"""Parameters that are DTensors: plans step the local piece, and state lies in ``optimizer.state`` placed like it.

So sharded checkpoints, which know DTensors, save every rank's piece. A buffer with a value for each element has the
parameter's placements. One with a value for each block (or packed codes) is a vector of the pieces of all shards, each
piece as long as the largest shard's, since DTensor cuts a vector into equal parts. Blocks follow the local piece: one
that a shard boundary cuts has a scale on either side.

The format of a slot goes by the size of the whole parameter: it must not depend on the number of ranks. Nor do random
numbers where a piece is a run of the whole tensor's memory, which it is for rows cut into shards.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optwatch.codecs import FORMATS

State = MutableMapping[str, Any]
#: Types that are no DTensor. They are asked about for each tensor, and asking a tensor for what it has not is slow.
_PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor; without importing torch.distributed."""
    return type(tensor) not in _PLAIN and isinstance(tensor, Tensor) and hasattr(tensor, "placements")


def is_partial(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor of which the ranks hold terms of a sum."""
    return is_sharded(tensor) and any(place.is_partial() for place in tensor.placements)  # type: ignore[attr-defined]


def _cut_along(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions of the mesh whose ranks hold different pieces of a DTensor."""
    # A strided shard (FSDP of what is cut for tensor parallelism already) does not call itself a shard.
    places = enumerate(tensor.placements)  # type: ignore[attr-defined]
    return tuple(dim for dim, place in places if not (place.is_replicate() or place.is_partial()))


def local(tensor: Tensor) -> Tensor:
    """The piece of a tensor that this rank holds: the tensor itself unless it is a DTensor. No copy."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        piece: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return piece


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


@torch.no_grad()
def local_gradient(grad: Tensor, param: Tensor) -> Tensor:
    """This rank's piece of a gradient, as ``param`` is cut; where the gradient is cut otherwise, ranks exchange it."""
    if is_sharded(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    piece = local(grad)
    wait = getattr(piece, "wait", None)  # what a collective that is under way will have put there
    return piece if wait is None else wait()


class Origin(NamedTuple):
    """Where this rank's piece of a tensor lies, as far as random numbers ask: those of two pieces differ in either."""

    element: int  # its first one, counted in the whole tensor's memory
    shard: int  # the number of the shard where a piece is no run of that memory, and ``element`` is 0; else 0


def origin(param: Tensor) -> Origin:
    """See :class:`Origin`. Replicas of a shard have the same, whatever tensor is no DTensor has zeros."""
    if not is_sharded(param):
        return Origin(0, 0)
    element = _first_element(param)
    # Elements share their random numbers in pairs.
    return Origin(element, 0) if element is not None and element % 2 == 0 else Origin(0, _shard_number(param))


def _first_element(param: Tensor) -> int | None:
    """The place of this rank's first element in the whole tensor's memory; None if the piece is no run of it."""
    mesh, along = param.device_mesh, _cut_along(param)  # type: ignore[attr-defined]
    places = param.placements  # type: ignore[attr-defined]
    if not along:
        return 0
    if not all(places[dim].is_shard(0) for dim in along) or param.stride()[0] < max(param.stride()):
        return None
    first, rows = 0, param.shape[0]
    for dim in along:
        longest = -(-rows // mesh.size(dim))
        begin = min(longest * mesh.get_local_rank(dim), rows)
        first, rows = first + begin, min(longest, rows - begin)
    return first * math.prod(param.shape[1:])


def _shard_number(param: Tensor) -> int:
    """Which of the shards of ``param`` this rank holds; replicas of a shard have the same number."""
    mesh, number = param.device_mesh, 0  # type: ignore[attr-defined]
    for dim in _cut_along(param):
        number = number * mesh.size(dim) + mesh.get_local_rank(dim)
    return number


def largest_shard(param: Tensor) -> int:
    """Elements of the largest shard of ``param``, which the others' vectors are as long as."""
    if not is_sharded(param):
        return param.numel()
    sizes = list(param.shape)
    for dim in _cut_along(param):
        cut = param.placements[dim].dim  # type: ignore[attr-defined]
        sizes[cut] = -(-sizes[cut] // param.device_mesh.size(dim))  # type: ignore[attr-defined]
    return math.prod(sizes)


class _Cut(NamedTuple):
    """Tensors that are cut along the same dimensions of the same mesh, as far as one plan has them."""

    plan: int  # its number
    rows: Tensor  # of the plan's sums
    places: Tensor  # among all tensors that are cut so


class Shards:
    """Adds up what the ranks have summed, each of its own pieces of tensors.

    ``params`` are all of an optimizer, of which each of ``plans`` has the ones at some indices. The ranks add up one
    vector for all parameters that are cut the same way, so plans may differ between ranks that lack a gradient.
    """

    def __init__(self, params: Sequence[Tensor], plans: Sequence[Sequence[int]]) -> None:
        ways: dict[tuple[Any, tuple[int, ...]], list[int]] = defaultdict(list)
        for index, param in enumerate(params):
            if is_sharded(param) and (along := _cut_along(param)):
                ways[param.device_mesh, along].append(index)  # type: ignore[attr-defined]
        self._ways = []
        for (mesh, along), members in ways.items():
            device, place = params[members[0]].device, {index: at for at, index in enumerate(members)}
            cuts = []
            for number, plan in enumerate(plans):
                rows = [row for row, index in enumerate(plan) if index in place]
                places = [place[plan[row]] for row in rows]
                cuts.append(
                    _Cut(number, torch.tensor(rows, device=device), torch.tensor(places, device=device))
                )
            found = [cut for cut in cuts if len(cut.rows)]
            self._ways.append(([mesh.get_group(dim) for dim in along], len(members), device, found))

    def add(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """``sums``, ``[tensors, columns]`` float64 for each plan, of whole tensors instead of this rank's pieces.

        What is not cut is the same on every rank already. The ranks wait for each other on the device.
        """
        whole = [rows.clone() for rows in sums] if self._ways else list(sums)
        for groups, members, device, cuts in self._ways:
            part = torch.zeros(members, sums[0].shape[1], dtype=torch.float64, device=device)
            for cut in cuts:
                part[cut.places] = sums[cut.plan][cut.rows]
            for group in groups:
                torch.distributed.all_reduce(part, group=group)
            for cut in cuts:
                whole[cut.plan][cut.rows] = part[cut.places]
        return whole

    def __bool__(self) -> bool:
        """Whether any tensor is cut."""
        return bool(self._ways)


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
        return math.prod(mesh.size(dim) for dim in _cut_along(self._param))

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
        along = _cut_along(self._param)
        dimensions = range(self._param.device_mesh.ndim)  # type: ignore[attr-defined]
        placements = [Shard(0) if dim in along else Replicate() for dim in dimensions]
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
