"""The values that the sweep gives to ops: those at which arithmetic goes wrong first, and random ones of every size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
INTEGERS = {"int64": torch.int64, "int32": torch.int32, "int8": torch.int8, "uint8": torch.uint8, "bool": torch.bool}
DTYPES = {**FLOATS, **INTEGERS}

# Not a multiple of any vector's length: code for what is left over runs, too.
RANDOM = 2003
ROWS, COLUMNS = 37, 67


def ones(dtype: torch.dtype) -> Tensor:
    """Values for an op that takes one tensor; in 16 bits, all that there are."""
    if dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        return torch.cat([every, every[:3]])
    if not dtype.is_floating_point:
        return torch.cat([specials(dtype), _random(dtype, RANDOM, 0)])
    near_ones = 1 + torch.arange(-64, 65).double() * torch.finfo(dtype).eps
    return torch.cat([specials(dtype), _random(dtype, 2 * RANDOM, 0), near_ones.to(dtype)])


def several(dtype: torch.dtype, count: int) -> list[Tensor]:
    """Values for an op that takes several tensors: pairs of all special ones, multiples, and random ones."""
    edges = specials(dtype)
    if count > 2:
        picks = [_picked(edges, 3 * RANDOM, seed) for seed in range(count)]
        return [torch.cat([pick, _random(dtype, RANDOM, seed)]) for seed, pick in enumerate(picks)]
    first, second = (grid.flatten() for grid in torch.meshgrid(edges, edges, indexing="ij"))
    divisors, factors = _moderate(dtype, RANDOM, 3), torch.randint(-9, 10, (RANDOM,), generator=_generator(4))
    if dtype is torch.bool:
        return [first, second]
    multiples = (divisors * factors.to(dtype)).to(dtype)
    return [
        torch.cat([first, multiples, _random(dtype, RANDOM, 0)]),
        torch.cat([second, divisors, _random(dtype, RANDOM, 1)]),
    ]


def rows(dtype: torch.dtype, special: bool) -> Tensor:
    """A matrix to reduce: of special values in places, or of positive numbers whose sums cannot cancel."""
    if not dtype.is_floating_point:
        return _picked(specials(dtype), ROWS * COLUMNS, 5).view(ROWS, COLUMNS)
    numbers = torch.rand(ROWS, COLUMNS, generator=_generator(6), dtype=torch.float64) + 0.5
    if not special:
        return numbers.to(dtype)
    numbers = numbers * torch.randn(ROWS, COLUMNS, generator=_generator(7), dtype=torch.float64).sign()
    for row, value in enumerate([0.0, -0.0, math.inf, -math.inf, math.nan]):
        numbers[row, row] = value
        numbers[row + 10] = value
    numbers[20, :2] = torch.tensor([math.inf, -math.inf])
    return numbers.to(dtype)


def scalars(dtype: torch.dtype) -> list[float]:
    """Python numbers beside a tensor: what 16 bits do not hold, ties, signs, what is not finite."""
    return [0.1, 1.7, -3, 0.5, 0.0, 0, math.inf] if dtype.is_floating_point else [3, -2, 1.7, 0.1]


def specials(dtype: torch.dtype) -> Tensor:
    """Zeros, subnormal numbers, powers of ten, infinities, NaN, ties, extremes; the limits of integers."""
    if dtype is torch.bool:
        return torch.tensor([False, True])
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        small = [0, 1, 2, 3, 5, 7, 10, 31, 63, 64, 100, 127]
        negative = [-n for n in small] if limits.min < 0 else []
        return torch.tensor([*small, *negative, limits.max, limits.max - 1, limits.min, limits.min + 1]).to(dtype)
    info = torch.finfo(dtype)
    subnormal = info.smallest_normal * info.eps
    magnitudes = [0.0, subnormal, 3 * subnormal, info.smallest_normal, info.eps, info.max, math.inf]
    magnitudes += [10.0**-n for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 30, 35, 38)]
    magnitudes += [0.3, 0.5, 0.6, 0.7, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 5.0, 10.0, 20.0, 88.5, 89.5, 127.0, 128.5, 255.0]
    magnitudes += [math.pi / 2, math.pi, 300.0, 32768.0, 65504.0, 2.0**24 + 2, 2.0**31, 2.0**63, 1e10, 1e30]
    both = torch.tensor([*magnitudes, *(-m for m in magnitudes), math.nan], dtype=torch.float64)
    return both.to(dtype)


def _random(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Of all magnitudes and both signs, half of them moderate; integers of the whole range."""
    generator = _generator(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, (count,), generator=generator).bool()
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max, (count,), generator=generator, dtype=torch.int64).to(dtype)
    low, high = math.log(torch.finfo(dtype).smallest_normal), math.log(torch.finfo(dtype).max)
    exponents = torch.rand(count // 2, generator=generator, dtype=torch.float64) * (high - low) + low
    wild = exponents.exp() * torch.randn(count // 2, generator=generator, dtype=torch.float64).sign()
    return torch.cat([wild.to(dtype), _moderate(dtype, count - count // 2, seed)])


def _moderate(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    generator = _generator(seed + 100)
    if not dtype.is_floating_point:
        return torch.randint(1, 12, (count,), generator=generator).to(dtype)
    return (torch.randn(count, generator=generator, dtype=torch.float64) * 5).to(dtype)


def _picked(values: Tensor, count: int, seed: int) -> Tensor:
    return values[torch.randint(0, len(values), (count,), generator=_generator(seed))]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
