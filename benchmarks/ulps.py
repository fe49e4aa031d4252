"""How far apart two results are, in units in the last place (ULPs) of their dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Distance:
    """Between tensors of the same shapes and dtypes.

    Attributes:
        elements: how many there are.
        different: how many of them have different bits. A NaN is as good as any other.
        ulps: how many numbers of the dtype, at most, lie from one element to the other; infinite from NaN to a number.
            From 0.0 to -0.0 it is one.
    """

    elements: int
    different: int
    ulps: float

    @staticmethod
    def between(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> Distance:
        return Distance.greatest(_between(one, other) for one, other in zip(actual, expected, strict=True))

    @staticmethod
    def apart(actual: Tensor, expected: Tensor) -> Tensor:
        """For each element, how many numbers of the dtype lie from one to the other; none from NaN to NaN."""
        both_nan = actual.float().isnan() & expected.float().isnan()
        return torch.where(both_nan, 0, (_rank(actual) - _rank(expected)).abs())

    @staticmethod
    def greatest(distances: Iterable[Distance]) -> Distance:
        """Of all elements together."""
        found = tuple(distances)
        return Distance(
            sum(distance.elements for distance in found),
            sum(distance.different for distance in found),
            max((distance.ulps for distance in found), default=0),
        )


def _between(actual: Tensor, expected: Tensor) -> Distance:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    nan, other_nan = actual.float().isnan(), expected.float().isnan()
    apart = Distance.apart(actual, expected)
    ulps = math.inf if bool((nan != other_nan).any()) else int(apart.max()) if apart.numel() else 0
    return Distance(actual.numel(), int(apart.count_nonzero()), ulps)


def _rank(tensor: Tensor) -> Tensor:
    """Integers in the order of the numbers, with -0.0 next to 0.0: bits are a sign and a magnitude."""
    bits = tensor.contiguous().view(_INTEGERS[tensor.itemsize]).long()
    smallest = torch.iinfo(_INTEGERS[tensor.itemsize]).min
    return torch.where(bits < 0, smallest + ~bits, bits)
