"""Bad arguments of public functions, told where they are given: each message begins with the function's name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

from .._torch.inductor import is_compiled

_SUSPENDING = (
    (inspect.iscoroutinefunction, "an async function"),
    (inspect.isasyncgenfunction, "an async generator function"),
    (inspect.isgeneratorfunction, "a generator function"),
)


def check_plain(fn: Any, asked_by: str) -> None:
    """Refuse what a ``with`` block around its call would not contain.

    Raises:
        TypeError: ``fn`` is such a function, a class, or no function at all.
    """
    if isinstance(fn, type) or not callable(fn):
        raise TypeError(f"{asked_by}: {fn!r} is not a function")
    for is_kind, kind in _SUSPENDING:
        if any(map(is_kind, (inspect.unwrap(fn), getattr(fn, "__call__", None)))):  # noqa: B004
            raise TypeError(
                f"{asked_by}: {fn!r} is {kind}, whose body runs after the call has returned; "
                f"write `with mode:` in its body, around the calls that are to be compiled"
            )


def check_implementation(fn: Any, asked_by: str, *, methods: bool = False) -> None:
    """Refuse what cannot be the implementation of an op, which is a function of its arguments alone, with type hints.

    Args:
        fn: what was given.
        asked_by: who asks.
        methods: whether a method of an object will do as well.

    Raises:
        TypeError: ``fn`` is something else.
    """
    check_plain(fn, asked_by)
    if is_compiled(fn):
        raise TypeError(
            f"{asked_by}: {fn!r} is compiled by torch.compile already; give the function that it was made of, or use "
            f"dispatch_compile.native, which takes that by itself"
        )
    if inspect.ismethod(fn) and not methods:
        raise TypeError(
            f"{asked_by}: {fn!r} depends on the object that it is a method of; give a function of "
            f"tensors, or use dispatch_compile.native"
        )
    if isinstance(fn, functools.partial):
        raise TypeError(
            f"{asked_by}: {fn!r} has no type hints of its own; write a function that calls it, or use "
            f"dispatch_compile.native"
        )
    if not inspect.isfunction(fn) and not inspect.ismethod(fn):
        raise TypeError(f"{asked_by}: {fn!r} is not a Python function; write one that calls it")


def check_bools(asked_by: str, **values: Any) -> None:
    """Refuse what is neither True nor False.

    Raises:
        TypeError: a value is something else.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{asked_by}: {name} must be True or False, not {value!r}")


def check_whole(asked_by: str, name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number, or too small.

    Raises:
        TypeError, ValueError: it is.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{asked_by}: {name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{asked_by}: {name} must be {least} or more, not {value}")


def checked_names(asked_by: str, what: str, names: Any) -> tuple[str, ...]:
    """Names that were given as a list.

    Raises:
        TypeError: it is none, a single name for instance.
    """
    if isinstance(names, str):
        raise TypeError(f"{asked_by}: {what} is a list of names; write [{names!r}]")
    if not isinstance(names, Iterable):
        raise TypeError(f"{asked_by}: {what} must be a list of names, not {names!r}")
    listed = tuple(names)
    for name in listed:
        if not isinstance(name, str):
            raise TypeError(f"{asked_by}: {what} must be strings, not {name!r}")
    return listed


def checked_activations(asked_by: str, parameters: dict[str, str], given: Any) -> list[str]:
    """The activations that were given, or else those that are named as such.

    Args:
        asked_by: who asks.
        parameters: the types of an op's parameters by name, as its schema has them.
        given: the names; None for the parameters that start with ``x``.

    Raises:
        TypeError: it is no list of names.
        ValueError: an activation that is no parameter, or no tensor.
    """
    if given is None:
        return [name for name in parameters if name.startswith("x")]
    activations = checked_names(asked_by, "activations", given)
    missing = [name for name in activations if name not in parameters]
    if missing:
        raise ValueError(f"{asked_by}: activations {missing} are not among the parameters {list(parameters)}")
    for name in activations:
        if "Tensor" not in parameters[name]:
            raise ValueError(f"{asked_by}: activation {name!r} is no tensor: its type is {parameters[name]}")
    return list(activations)
