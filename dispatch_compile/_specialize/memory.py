"""Which tensors share memory: of two that do, code must not write to one and read the other in its own order."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .arguments import Leaf


def sharing(written: Iterable[Leaf], tensors: Iterable[Leaf]) -> tuple[Leaf, Leaf] | None:
    """A tensor that is written, and another that may share memory with it; None if there are none."""
    others = list(tensors)
    for leaf in written:
        for other in others:
            if other.source != leaf.source and not apart(leaf.value, other.value):
                return leaf, other
    return None


def apart(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether no element of one tensor shares memory with one of the other.

    Told of tensors of different storages, of different parts of one, and of different columns of one matrix; of others
    that share a storage it is said that they are not.
    """
    if one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr() or not one.numel() or not other.numel():
        return True
    begin, other_begin = one.data_ptr(), other.data_ptr()
    if begin + _extent(one, 0) <= other_begin or other_begin + _extent(other, 0) <= begin:
        return True
    if not one.dim() or not other.dim():
        return False
    row = one.stride(0) * one.element_size()
    width, other_width = _extent(one, 1), _extent(other, 1)
    if row != other.stride(0) * other.element_size() or max(width, other_width) > row:
        return False
    distance = (other_begin - begin) % row
    return bool(width <= distance and other_width <= row - distance)


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether elements of a tensor may share memory with each other."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent = stride * (size - 1) + extent
    return False


def _extent(tensor: torch.Tensor, first: int) -> int:
    """From the first to behind the last element over the dimensions from ``first`` on, in bytes."""
    steps = zip(tensor.size()[first:], tensor.stride()[first:], strict=True)
    return int((1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size())
