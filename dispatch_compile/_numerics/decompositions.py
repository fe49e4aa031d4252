"""Ops put together so that Inductor's code for them gives eager's results, where it does not by itself.

Each takes an op's arguments. A result NotImplemented leaves the call to Inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.types import Number

from .._torch.dispatch import OpOverload, without_modes

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
CONVERTED_THROUGH = {torch.int8: torch.int32, torch.int16: torch.int32, torch.uint8: torch.int64}
LARGEST_ROUNDED_TO_E4M3 = 464.0  # to 448, the largest number; halfway to what would be the next

Limit: TypeAlias = Tensor | Number | None


def floor_divide(a: Tensor | Number, b: Tensor | Number) -> Any:
    """As Python does it, from the exact remainder: the floor of a rounded quotient can be off by one."""
    dtype = torch.result_type(a, b)
    if not dtype.is_floating_point:
        return NotImplemented
    inverse = _inverse_on_gpu(a, b, dtype)
    a, b = _computed_in(a, b)
    rounded = a / b if inverse is None else a * inverse
    modulus = torch.fmod(a, b)
    # fmod gives NaN on a CPU where the quotient is too large.
    whole = torch.where(rounded.isinf() & ~a.isinf(), a, a - modulus)
    quotient = whole / b if inverse is None else whole * inverse
    quotient = torch.where((modulus != 0) & ((modulus < 0) != (b < 0)), quotient - 1, quotient)
    floor = quotient.floor()
    floor = torch.where(quotient - floor > 0.5, floor + 1, floor)
    return torch.where(b == 0, rounded, torch.copysign(floor, rounded)).to(dtype)


def divide(a: Tensor | Number, b: Tensor | Number, rounding_mode: str | None = None) -> Any:
    dtype = torch.result_type(a, b)
    if rounding_mode == "floor":
        return floor_divide(a, b)
    if rounding_mode == "trunc" and (inverse := _inverse_on_gpu(a, b, dtype)) is not None:
        return torch.trunc(_computed_in(a, b)[0] * inverse).to(dtype)
    return NotImplemented


def _inverse_on_gpu(a: Tensor | Number, b: Tensor | Number, dtype: torch.dtype) -> Number | None:
    """What eager multiplies by, on a GPU, instead of dividing by a number."""
    if not dtype.is_floating_point or isinstance(b, Tensor) or b == 0 or not isinstance(a, Tensor) or not a.is_cuda:
        return None
    with without_modes():
        inverse: Number = torch.tensor(b, dtype=torch.float32 if dtype in SIXTEEN_BITS else dtype).reciprocal().item()
    return inverse


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
    """A product with the integer 0, which Inductor takes for zeros also where there are infinities and NaN, or with a
    number that is not rounded to 16 bits."""
    dtype = torch.result_type(x, y)
    if dtype.is_floating_point and (_is_integer_zero(x) or _is_integer_zero(y)):
        return x * 0.0 if _is_integer_zero(y) else y * 0.0
    if dtype not in SIXTEEN_BITS or isinstance(y, Tensor) or not isinstance(x, Tensor):
        return NotImplemented
    return (x.float() * y).to(dtype)


def div_in_32_bits(x: Tensor, number: Tensor | Number) -> Any:
    if isinstance(number, Tensor) or x.dtype not in SIXTEEN_BITS:
        return NotImplemented
    return (x.float() / number).to(x.dtype)


def full(size: Sequence[int], number: Number, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """With the number as it is in the result."""
    if dtype not in SIXTEEN_BITS or (rounded := _rounded_number(number, dtype)) == number:
        return NotImplemented
    return torch.full(size, rounded, dtype=dtype, **kwargs)


def full_like(x: Tensor, number: Number, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    dtype = dtype or x.dtype
    if dtype not in SIXTEEN_BITS or (rounded := _rounded_number(number, dtype)) == number:
        return NotImplemented
    return torch.full_like(x, rounded, dtype=dtype, **kwargs)


def _is_integer_zero(operand: Tensor | Number) -> bool:
    return isinstance(operand, int) and operand == 0


def clamp(x: Tensor, low: Number | None = None, high: Number | None = None) -> Tensor:
    """Of zeros of both signs, eager keeps the tensor's."""
    if low is not None:
        x = torch.where(x < low, low, x)
    return x if high is None else torch.where(x > high, high, x)


def clamp_max(x: Tensor, high: Number) -> Tensor:
    return clamp(x, None, high)


def clamp_on_gpu(x: Tensor, low: Limit = None, high: Limit = None) -> Any:
    """There -0.0 is smaller than 0.0."""
    if not x.is_floating_point():
        return NotImplemented
    if low is not None:
        x = maximum(x, low) if isinstance(low, Tensor) else torch.where(x <= low, low, x)
    if high is not None:
        x = minimum(x, high) if isinstance(high, Tensor) else torch.where(x > high, high, x)
    return x


def clamp_max_on_gpu(x: Tensor, high: Limit) -> Any:
    return clamp_on_gpu(x, None, high)


def relu(x: Tensor) -> Any:
    return clamp_on_gpu(x, 0)


def hardtanh_on_gpu(x: Tensor, low: Number = -1, high: Number = 1) -> Any:
    return clamp_on_gpu(x, low, high)


def maximum(a: Tensor, b: Tensor) -> Any:
    if not torch.result_type(a, b).is_floating_point:
        return NotImplemented
    return torch.where((a == 0) & (b == 0), a + b, torch.where((a > b) | a.isnan(), a, b))


def minimum(a: Tensor, b: Tensor) -> Any:
    if not torch.result_type(a, b).is_floating_point:
        return NotImplemented
    smaller_zero = (a * -1.0 + b * -1.0) * -1.0
    return torch.where((a == 0) & (b == 0), smaller_zero, torch.where((a < b) | a.isnan(), a, b))


def sigmoid(x: Tensor) -> Any:
    """With the exact exp; Triton's own sigmoid has one that loses digits as its argument grows."""
    computed_in = torch.result_type(x, 1.0)
    return (1 + (x * -1.0).exp()).reciprocal() if computed_in is torch.float32 else NotImplemented


def glu(x: Tensor, dim: int = -1) -> Any:
    gated, gate = x.chunk(2, dim)
    return gated * sigmoid(gate) if x.dtype is torch.float32 else NotImplemented


def to_copy(x: Tensor, *, dtype: torch.dtype | None = None, **layout: Any) -> Any:
    """What 8 or 16 bits do not hold goes through more in eager; what float8_e4m3fn does not hold becomes NaN."""
    if dtype in CONVERTED_THROUGH and x.is_floating_point():
        return x.to(CONVERTED_THROUGH[dtype]).to(dtype=dtype, **layout)
    if dtype is torch.float8_e4m3fn and x.is_cuda and x.is_floating_point() and x.dtype not in FLOAT8 and not layout:
        in_range = x.abs() <= LARGEST_ROUNDED_TO_E4M3
        return torch.ops.prims.convert_element_type(torch.where(in_range, x, torch.nan), dtype)
    return NotImplemented


def neg(x: Tensor) -> Any:
    """Subtracting from zero, as Triton does, gives the wrong zero."""
    return x * -1.0 if x.is_floating_point() else NotImplemented


def hardtanh(x: Tensor, low: Number = -1, high: Number = 1) -> Tensor:
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
