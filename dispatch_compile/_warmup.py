"""Calls that are made ahead, so that the calls to come find their code: the arguments for other numbers of tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ._specialize.arguments import Leaf, with_tokens
from ._specialize.aside import why_own_kind, why_special


def arguments_with_tokens(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], tokens: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A function's arguments for another number of tokens: see :meth:`DispatchCompileMode.warmup`.

    Raises:
        ValueError: a negative number, or no argument that has tokens.
    """
    if tokens < 0:
        raise ValueError(f"warmup: tokens must be 0 or more, not {tokens}")
    given = [value for _, value in _named(fn, args, kwargs)]
    activations = [value for name, value in _named(fn, args, kwargs) if name.startswith("x")]
    having = next((tensor for tensor in _tensors([activations, given]) if tensor.dim()), None)
    if having is None:
        raise ValueError("warmup: tokens is given, but none of the arguments is a tensor with a dimension 0")
    count = having.size(0)

    def replaced(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (
                with_tokens(Leaf("", "", "", value, activation=True, dynamic=True), tokens)
                if _has_tokens(value, count)
                else value
            )
        if type(value) in (list, tuple):
            return type(value)(map(replaced, value))
        if type(value) is dict:
            return {name: replaced(item) for name, item in value.items()}
        return value

    return replaced(args), replaced(dict(kwargs))


def _has_tokens(tensor: torch.Tensor, count: int) -> bool:
    if isinstance(tensor, torch.nn.Parameter) or tensor.dim() == 0 or tensor.size(0) != count:
        return False
    return why_own_kind(tensor) is None and why_special(tensor) is None


def _named(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The arguments with the names of their parameters, as far as a signature tells."""
    try:
        yield from inspect.signature(fn).bind(*args, **kwargs).arguments.items()
    except (TypeError, ValueError):  # it has none, or the call is wrong, which making it tells
        yield from (("", value) for value in args)
        yield from kwargs.items()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif type(value) in (list, tuple):
        for item in value:
            yield from _tensors(item)
    elif type(value) is dict:
        yield from _tensors(list(value.values()))
