"""What a ``supports_args`` reads. Of one that reads shapes, dtypes and devices of its arguments, and constants, it can
be told while an implementation is captured what it will say in later calls: its guards on sizes are the graph's, and
the constants can be compared. Of any other it cannot."""

from __future__ import annotations

import builtins
import dis
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch

from .reading import CannotTell, globals_read, nested_code

_CONSTANT = (
    *(bool, int, float, complex, str, bytes, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)

# Not type() and isinstance(): the arguments that a capture has are of another class than those of later calls.
_BUILTINS = frozenset(
    getattr(builtins, name)
    for name in """
    abs all any bool dict divmod enumerate filter float frozenset int len list map max min pow range reversed round set
    sorted sum tuple zip
    """.split()
)
_MODULES = ("math", "_operator")

# Not those by which tensors of one key may differ: storage_offset, data_ptr, requires_grad.
_ATTRIBUTES = frozenset(
    """
    shape size ndim dim numel nelement stride is_contiguous dtype itemsize element_size nbytes is_floating_point
    is_complex is_signed bits device type index get_device is_cuda is_cpu layout is_sparse startswith endswith
    bit_length
    """.split()
)
_CHANGES_OR_HIDES = ("IMPORT", "STORE_ATTR", "STORE_GLOBAL", "DELETE", "MATCH_CLASS", "LOAD_BUILD_CLASS")

_MISSING = object()


class Unclear(Exception):
    """A predicate may read something else; the message says what, for people: ``reads x.data_ptr``."""


@dataclass(frozen=True)
class Reads:
    """What a function and those that it calls read beside arguments, as it was. No function is kept alive."""

    _function: weakref.ref[FunctionType]
    _constants: tuple[tuple[str, Any], ...]
    _helpers: tuple[tuple[str, Reads], ...]

    def unchanged(self) -> bool:
        """Whether the function would read the same now."""
        function = self._function()
        return (
            function is not None
            and all(_same(_read(function, name), value) for name, value in self._constants)
            and all(_read(function, name) is helper._function() for name, helper in self._helpers)
            and all(helper.unchanged() for _, helper in self._helpers)
        )


def reads_of(predicate: Callable[..., Any]) -> Reads:
    """What a predicate on arguments reads beside them.

    Raises:
        Unclear: something that may change without notice.
    """
    return _reads_of(predicate, ())


def _reads_of(function: Any, callers: tuple[Any, ...]) -> Reads:
    if type(function) is not FunctionType:
        raise Unclear(f"is a {type(function).__name__}, not a function")
    if function in callers:
        raise Unclear("calls itself")
    if function.__code__.co_flags & (CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR):
        raise Unclear("is a generator or a coroutine")
    if vars(function) or not all(map(_is_constant, _defaults(function))):
        raise Unclear("has attributes or defaults that may change")
    try:
        found = globals_read(function)
    except CannotTell as reason:
        raise Unclear(f"reads what cannot be looked at: {reason}") from None
    found.update({name: _read(function, name) for name in function.__code__.co_freevars})
    of_modules = {part for name in found for part in name.split(".")}
    for name in _attributes_read(function):
        if name not in _ATTRIBUTES and name not in of_modules:
            raise Unclear(f"reads .{name}")
    constants, helpers = [], []
    for name, value in found.items():
        if _is_constant(value):
            constants.append((name, value))
        elif type(value) is FunctionType:
            helpers.append((name, _reads_of(value, (*callers, function))))
        elif not _is_pure(value):
            raise Unclear(f"reads {name}")
    return Reads(weakref.ref(function), tuple(constants), tuple(helpers))


def _defaults(function: FunctionType) -> Iterator[Any]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()


def _is_constant(value: Any) -> bool:
    if type(value) in (tuple, frozenset):
        return all(map(_is_constant, value))
    return type(value) in _CONSTANT


def _is_pure(value: Any) -> bool:
    if isinstance(value, BuiltinFunctionType) and value.__module__ in _MODULES:
        return True
    return isinstance(value, (BuiltinFunctionType, type)) and value in _BUILTINS


def _attributes_read(function: FunctionType) -> Iterator[str]:
    """The attributes that the function loads.

    Raises:
        Unclear: it does more than to load and to compute.
    """
    for code in nested_code(function.__code__):
        for instruction in dis.get_instructions(code):
            name = instruction.opname
            if name.startswith(_CHANGES_OR_HIDES):
                raise Unclear(f"does more than to look at its arguments ({name})")
            if name == "STORE_DEREF" and instruction.argval in function.__code__.co_freevars:
                raise Unclear(f"changes {instruction.argval}")
            if name in ("LOAD_ATTR", "LOAD_METHOD"):
                yield instruction.argval


def _read(function: FunctionType, name: str) -> Any:
    """What the function would find under a dotted name of its closure, its globals, or Python's own."""
    first, *rest = name.split(".")
    if first in function.__code__.co_freevars:
        cell = (function.__closure__ or ())[function.__code__.co_freevars.index(first)]
        try:
            value = cell.cell_contents
        except ValueError:
            return _MISSING
    else:
        value = function.__globals__.get(first, getattr(builtins, first, _MISSING))
    for part in rest:
        value = getattr(value, part, _MISSING)
    return value


def _same(value: Any, before: Any) -> bool:
    return value is before or (type(value) is type(before) and repr(value) == repr(before))
