"""Ops put together so that Inductor's code for them gives eager's results, where it does not by itself.

Each takes an op's arguments. A result NotImplemented leaves the call to Inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.types import Number

from ._torch_private import OpOverload, without_modes

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LARGEST_ROUNDED_TO_E4M3 = 464.0  # to 448, the largest number; halfway to what would be the next


def floor_divide(a: Tensor | Number, b: Tensor | Number) -> Any:
    """As Python does it, from the exact remainder: the floor of a rounded quotient can be off by one."""
    dtype = torch.result_type(a, b)
    if not dtype.is_floating_point:
        return NotImplemented
    a, b = _computed_in(a, b)
    rounded = a / b
    modulus = torch.fmod(a, b)
    # fmod gives NaN on a CPU where the quotient is too large.
    quotient = torch.where(rounded.isinf() & ~a.isinf(), a, a - modulus) / b
    quotient = torch.where((modulus != 0) & ((modulus < 0) != (b < 0)), quotient - 1, quotient)
    floor = quotient.floor()
    floor = torch.where(quotient - floor > 0.5, floor + 1, floor)
    return torch.where(b == 0, rounded, torch.copysign(floor, rounded)).to(dtype)


def divide(a: Tensor | Number, b: Tensor | Number, rounding_mode: str | None = None) -> Any:
    return floor_divide(a, b) if rounding_mode == "floor" else NotImplemented


def remainder(a: Tensor | Number, b: Tensor | Number) -> Any:
    """From the exact remainder, whose sign is the dividend's."""
    dtype = torch.result_type(a, b)
    if not dtype.is_floating_point:
        return NotImplemented
    a, b = _computed_in(*_rounded(a, b, dtype))
    modulus = torch.fmod(a, b)
    return torch.where((modulus != 0) & ((modulus < 0) != (b < 0)), modulus + b, modulus).to(dtype)


def rounding_its_number(op: OpOverload, dtypes: Sequence[torch.dtype] = SIXTEEN_BITS) -> Callable[..., Any]:
    """For an op of a tensor of one of the dtypes and a number, which eager rounds to that dtype."""

    def decomposition(x: Tensor, number: Tensor | Number, *more: Any, **kwargs: Any) -> Any:
        if isinstance(number, Tensor) or x.dtype not in dtypes:
            return NotImplemented
        rounded = _rounded_number(number, x.dtype)
        return NotImplemented if rounded == number else op(x, rounded, *more, **kwargs)

    return decomposition


def mul(x: Tensor | Number, y: Tensor | Number) -> Any:
    """A product with the integer 0, which Inductor takes for zeros also where there are infinities and NaN."""
    if not torch.result_type(x, y).is_floating_point or not (_is_integer_zero(x) or _is_integer_zero(y)):
        return NotImplemented
    return x * 0.0 if _is_integer_zero(y) else y * 0.0


def _is_integer_zero(operand: Tensor | Number) -> bool:
    return isinstance(operand, int) and operand == 0


def clamp(x: Tensor, low: Number | None = None, high: Number | None = None) -> Any:
    """Of zeros of both signs, eager keeps the tensor's."""
    if low is not None:
        x = torch.where(x < low, low, x)
    return x if high is None else torch.where(x > high, high, x)


def clamp_max(x: Tensor, high: Number) -> Any:
    return clamp(x, None, high)


def to_copy(x: Tensor, *, dtype: torch.dtype | None = None, **layout: Any) -> Any:
    """What int8 does not hold goes through 32 bits in eager; what float8_e4m3fn does not hold becomes NaN."""
    if dtype is torch.int8 and x.is_floating_point():
        return x.to(torch.int32).to(dtype=dtype, **layout)
    if dtype is torch.float8_e4m3fn and x.is_floating_point() and x.dtype not in FLOAT8 and not layout:
        in_range = x.abs() <= LARGEST_ROUNDED_TO_E4M3
        return torch.ops.prims.convert_element_type(torch.where(in_range, x, torch.nan), dtype)
    return NotImplemented


def neg(x: Tensor) -> Any:
    """Subtracting from zero, as Triton does, gives the wrong zero."""
    return x * -1.0 if x.is_floating_point() else NotImplemented


def hardtanh(x: Tensor, low: Number = -1, high: Number = 1) -> Any:
    return clamp(x, low, high)


def _computed_in(a: Tensor | Number, b: Tensor | Number) -> tuple[Tensor, Tensor]:
    """Both as tensors of the dtype in which eager computes."""
    dtype = torch.result_type(a, b)
    dtype = torch.float32 if dtype in SIXTEEN_BITS else dtype
    device = next(operand.device for operand in (a, b) if isinstance(operand, Tensor))
    first, second = (
        operand.to(dtype) if isinstance(operand, Tensor) else torch.full((), operand, dtype=dtype, device=device)
        for operand in (a, b)
    )
    return first, second


def _rounded(a: Tensor | Number, b: Tensor | Number, dtype: torch.dtype) -> tuple[Tensor | Number, Tensor | Number]:
    first, second = (operand if isinstance(operand, Tensor) else _rounded_number(operand, dtype) for operand in (a, b))
    return first, second


def _rounded_number(number: Number, dtype: torch.dtype) -> Number:
    with without_modes():
        rounded: Number = torch.tensor(number, dtype=dtype).item()
    return rounded
