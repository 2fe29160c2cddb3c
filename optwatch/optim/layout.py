"""The order in which a tensor's elements lie in memory: kernels see every tensor as a flat, gapless run.

A permuted tensor (``channels_last``, a transpose) is worked on in the order of its memory, so that it needs no copy;
its state lies in the same order.
"""

from __future__ import annotations

from torch import Tensor


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The permutation of dimensions that makes ``tensor`` contiguous; None if there is none (gaps, overlaps)."""
    if tensor.is_contiguous():
        return tuple(range(tensor.dim()))
    order = tuple(sorted(range(tensor.dim()), key=lambda d: (-tensor.stride()[d], d)))
    return order if tensor.permute(order).is_contiguous() else None


def flat(tensor: Tensor, order: tuple[int, ...] | None) -> Tensor | None:
    """``tensor`` as a flat view in ``order``; None where that takes a copy."""
    if order is None:
        return tensor.view(-1) if tensor.is_contiguous() else None
    permuted = tensor.permute(order)
    return permuted.view(-1) if permuted.is_contiguous() else None


def shaped(values: Tensor, shape: tuple[int, ...], order: tuple[int, ...] | None) -> Tensor:
    """The inverse of :func:`flat`: a view of flat ``values`` with ``shape``, its memory in ``order``."""
    if order is None:
        return values.view(shape)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return values.view([shape[d] for d in order]).permute(inverse)


def flat_copy(tensor: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """The elements of ``tensor`` flat in ``order``: a view where possible, else a copy."""
    return (tensor if order is None else tensor.permute(order)).reshape(-1)
