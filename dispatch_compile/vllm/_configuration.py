"""What the result of a ``CustomOp``'s ``forward_native`` depends on beside its arguments: the instance's attributes."""

from __future__ import annotations

from collections.abc import Hashable
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from .._torch.dispatch import OpOverload, OpOverloadPacket

# nn.Module's bookkeeping, and the method that vLLM chose: forward_native depends on neither.
_NOT_CONFIGURATION = {*vars(nn.Module()), "_forward_method"} - {"training"}
_SCALARS = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout}
_KNOWN_BY_IDENTITY = (type, Enum, FunctionType, BuiltinFunctionType, OpOverload, OpOverloadPacket)


class NotAnOp(Exception):
    """A ``forward_native`` cannot become an op; the text says why, as the end of a sentence about its instance."""


def configuration_of(instance: nn.Module) -> dict[str, Any]:
    """The attributes that ``forward_native`` may read.

    Raises:
        NotAnOp: the instance has parameters, buffers or submodules, whose tensors an op would have to be given.
    """
    for held in ("_parameters", "_buffers", "_modules"):
        for name, value in vars(instance)[held].items():
            if value is not None:
                raise NotAnOp(f"it holds {_article(value)} in {name!r}, which is no argument of forward_native")
    return {name: value for name, value in vars(instance).items() if name not in _NOT_CONFIGURATION}


def identity_of(configuration: dict[str, Any]) -> Hashable:
    """Something that is equal for two configurations only if every value in them is the same, of the same type.

    It is good for as long as the values are alive.

    Raises:
        NotAnOp: a value that may change unseen, such as a tensor or a list.
    """
    return frozenset((name, _identity(name, value)) for name, value in configuration.items())


def _identity(name: str, value: Any) -> Hashable:
    kind = type(value)
    if kind in _SCALARS:
        return kind, repr(value)  # tells True from 1, and 0.0 from -0.0
    if isinstance(value, _KNOWN_BY_IDENTITY):
        return kind, id(value)
    if isinstance(value, tuple):
        return kind, tuple(_identity(name, item) for item in value)
    raise NotAnOp(f"it holds {_article(value)} in {name!r}, which may change")


def _article(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
