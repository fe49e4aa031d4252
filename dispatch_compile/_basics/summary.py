"""Arguments and results as a trace keeps them: what can be said of a value without keeping the value.

A tracing mode makes several for each call, so they are to take a microsecond or two each.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import weakref
from types import FunctionType
from typing import Any, NamedTuple

import torch

from .._torch.capture import dtype_abbreviation

_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type(Ellipsis), slice, range, enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)

_dtype_text = functools.cache(dtype_abbreviation)


class TensorSummary(NamedTuple):
    """A tensor, but for its values.

    Attributes:
        dtype: torch's abbreviation, as in ``bf16``.
        shape: sizes; a symbolic one as its name.
        strides: in elements; None if the tensor is contiguous, or has none.
        device: ``"cpu"``, ``"cuda:0"``.
        id: the tensor's number in its trace, if that numbers tensors.
    """

    dtype: str
    shape: tuple[int | str, ...]
    strides: tuple[int, ...] | None
    device: str
    id: int | None = None

    def __str__(self) -> str:
        number = "" if self.id is None else f"${self.id}"
        strides = "" if self.strides is None else f"[{', '.join(map(str, self.strides))}]"
        return f"t{number}: {self.dtype}[{', '.join(map(str, self.shape))}]{strides}"


# A tensor, several values, or another value as its repr.
Summary = TensorSummary | list["Summary"] | tuple["Summary", ...] | str


def summary_of(value: Any, numbers: TensorNumbers | None = None) -> Summary:
    """What a trace keeps of a value; ``numbers`` gives tensors their ids."""
    if isinstance(value, torch.Tensor):
        return _tensor_summary(value, None if numbers is None else numbers.of(value))
    if isinstance(value, list):
        return [summary_of(item, numbers) for item in value]
    if isinstance(value, tuple):
        return tuple(summary_of(item, numbers) for item in value)
    if isinstance(value, dict):
        items = (f"{key!r}: {text_of(summary_of(item, numbers))}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        items = (f"{name}={text_of(summary_of(item, numbers))}" for name, item in fields)
        return f"{type(value).__name__}({', '.join(items)})"
    if isinstance(value, (type, FunctionType)):
        return value.__qualname__
    # The repr of another object may be long, or hold values of tensors, or an address.
    return repr(value) if isinstance(value, _PLAIN) else f"<{type(value).__name__}>"


def text_of(summary: Summary) -> str:
    """A summary as people read it: ``t: bf16[8, 2048]``, with the strides behind it where not contiguous."""
    if isinstance(summary, (list, tuple)) and not isinstance(summary, TensorSummary):
        items = ", ".join(map(text_of, summary))
        return f"[{items}]" if isinstance(summary, list) else f"({items})"
    return str(summary)


def _tensor_summary(tensor: torch.Tensor, number: int | None) -> TensorSummary:
    if tensor.is_nested:
        return TensorSummary(_dtype_text(tensor.dtype), ("nested",), None, str(tensor.device), number)
    plain = type(tensor) is torch.Tensor
    if plain and number is None and (tensor.layout is not torch.strided or tensor.is_contiguous()):
        return _without_strides(tensor.dtype, tensor.shape, tensor.device)
    shape = tuple(size if type(size) is int else str(size) for size in tensor.shape)
    strides = _strides_worth_telling(tensor, shape)
    return TensorSummary(_dtype_text(tensor.dtype), shape, strides, str(tensor.device), number)


@functools.lru_cache(maxsize=4096)
def _without_strides(dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> TensorSummary:
    return TensorSummary(_dtype_text(dtype), tuple(shape), None, str(device))


def _strides_worth_telling(tensor: torch.Tensor, shape: tuple[int | str, ...]) -> tuple[int, ...] | None:
    symbolic = any(isinstance(size, str) for size in shape)  # whether it is contiguous would be a guard on symbols
    if symbolic or tensor.layout is not torch.strided or tensor.is_contiguous():
        return None
    strides: tuple[int, ...] = tensor.stride()
    return strides


class TensorNumbers:
    """Numbers tensors in the order in which they are first seen, as long as they live."""

    def __init__(self) -> None:
        self._numbers: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._next = 0

    def of(self, tensor: torch.Tensor) -> int:
        known = self._numbers.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        number, self._next = self._next, self._next + 1
        key = id(tensor)
        self._numbers[key] = weakref.ref(tensor, lambda dead: self._forget(key, dead)), number
        return number

    def _forget(self, key: int, dead: weakref.ref[torch.Tensor]) -> None:
        known = self._numbers.get(key)
        if known is not None and known[0] is dead:  # else another tensor has come to stand there
            del self._numbers[key]
