"""Random numbers for stochastic rounding: a function of what is rounded, not of who rounds it.

The number of an element depends on (seed, parameter, slot, step, global element index) alone, so any launch layout,
thread count and backend rounds alike, and so do the replicas of a run. The host makes a 64-bit key of the first four;
the kernels hash it with the index of an element *pair* to 32 bits, the lower half for the even element. Sixteen bits
are plenty: the error of a probability stays below 2**-17, and its mean is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    z = z + _GAMMA
    for shift, factor in _MIX:
        z = (z ^ (z >> shift)) * factor
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def keys(
    seeds: NDArray[np.uint64],
    parameters: NDArray[np.uint64],
    slots: int,
    steps: NDArray[np.float64],
    first: NDArray[np.uint64] | None = None,
) -> NDArray[np.uint32]:
    """The keys ``[n, slots, 2]`` of ``n`` tensors with these seeds and parameter indices, each at its own step.

    Of pieces of tensors that begin at the elements ``first``, which are even: element 0 of a piece then has the number
    of element ``first`` of the whole. Beyond 2**33 elements that holds up to the next multiple of so many.
    """
    return keys_at(streams(seeds, parameters, slots), steps, None if first is None else added_to(first))


def keys_at(
    fixed: NDArray[np.uint64], steps: float | NDArray[np.float64], added: NDArray[np.uint32] | None
) -> NDArray[np.uint32]:
    """:func:`keys` from :func:`streams` and :func:`added_to`, at one step of all tensors or at each one's."""
    at = np.uint64(steps) if isinstance(steps, float) else steps.astype(np.uint64)[:, np.newaxis]
    made = _mix(fixed + at).view(np.uint32).reshape(*fixed.shape, 2)
    if added is not None:
        made[:, :, 0] += added[:, np.newaxis]
    return made


def streams(seeds: NDArray[np.uint64], parameters: NDArray[np.uint64], slots: int) -> NDArray[np.uint64]:
    """The part of the keys ``[n, slots]`` that is the same in each step."""
    tensors = _mix(_mix(seeds) + parameters)
    number: NDArray[np.uint64] = np.arange(slots, dtype=np.uint64)
    return _mix(tensors[:, np.newaxis] + number)


def added_to(first: NDArray[np.uint64]) -> NDArray[np.uint32] | None:
    """:func:`offsets`, None where every piece begins at element 0, as almost always."""
    return offsets(first) if first.any() else None


def offsets(first: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """What the lower halves of the keys of pieces get added, where :func:`numbers` adds the index of a pair."""
    pairs = first >> np.uint64(1)
    added: NDArray[np.uint64] = pairs + (pairs >> np.uint64(32)) * np.uint64(0x9E3779B9)
    return added.astype(np.uint32)


def device_keys(fixed: Tensor, added: Tensor, steps: Tensor) -> Tensor:
    """:func:`keys` where the steps lie, bit by bit: ``fixed`` are :func:`streams` as int64, ``added`` :func:`offsets`.

    torch has no 64-bit arithmetic without a sign; that of int64 has the same bits, and wraps as well.
    """
    z = fixed + steps.to(torch.int64)[:, None] + _signed(_GAMMA)
    for shift, factor in _MIX:
        z = (z ^ _shifted(z, int(shift))) * _signed(factor)
    made = (z ^ _shifted(z, 31)).view(torch.int32).view(*fixed.shape, 2)
    made[:, :, 0] += added[:, None]
    return made.view(torch.uint32)


def _signed(number: np.uint64) -> int:
    """The int64 with the same bits."""
    return int(number.astype(np.int64))


def _shifted(z: Tensor, by: int) -> Tensor:
    """``z`` to the right, with zeros from the left."""
    return (z >> by) & ((1 << 64 - by) - 1)


def numbers(key: Sequence[int], start: int, stop: int, device: torch.device) -> Tensor:
    """The numbers of elements ``[start, stop)`` as fp32 integers of [0, 65536), flat; ``start`` is even.

    The hash is the two-round multiply-xorshift function of C. Wellons' search ("lowbias32"), with half of the key
    added before it and half inside it.
    """
    pair = torch.arange(start // 2, (stop + 1) // 2, device=device)
    word = (pair & 0xFFFFFFFF) + int(key[0]) + (pair >> 32) * 0x9E3779B9
    word &= 0xFFFFFFFF
    word ^= word >> 16
    word = word * 0x7FEB352D & 0xFFFFFFFF
    word ^= int(key[1])
    word ^= word >> 15
    word = word * 0x846CA68B & 0xFFFFFFFF  # wraps in int64, which leaves the lower 32 bits right
    word ^= word >> 16
    return torch.stack([word & 0xFFFF, word >> 16], 1).view(-1)[: stop - start].float()
