"""``native``: plain functions and methods that run compiled inside a mode, and are themselves everywhere else."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, ClassVar, TypeVar, overload

import torch

from ._basics.checks import checked_names
from ._basics.fork import freed_in_children
from ._call.kernel import route_outside, run_function
from ._compile.reading import nested_code
from ._compile.surroundings import CACHING
from ._dispatch.active import innermost_entry
from ._ir import registry
from ._ir.embedded import IrOp
from ._ir.protocol import NATIVE
from ._saved.origin import NATIVES_OF
from ._specialize.arguments import Parameters
from ._specialize.callee import Callee
from ._specialize.guards import MISS
from ._torch.dispatch import CustomOpDef, OpOverload, OpOverloadPacket, is_dynamo_compiling, profiler, uncompiled

F = TypeVar("F", bound=Callable[..., Any])

# Values that are the program's code, not data that it reads.
_CODE = (FunctionType, BuiltinFunctionType, MethodType, ModuleType, type, CACHING)


@dataclass(frozen=True)
class Outside:
    """A variable that a function reads from outside of itself.

    Attributes:
        name: for people, as ``global LIMIT``.
        variable: its name in the function.
        cell: where a closed-over variable is; None for a global.
        scope: the module's globals where a global is.
    """

    name: str
    variable: str
    cell: CellType | None
    scope: dict[str, Any]

    def value(self) -> Any:
        """What it is now.

        Raises:
            ValueError, KeyError: it has no value.
        """
        return self.scope[self.variable] if self.cell is None else self.cell.cell_contents


def outside_of(fn: FunctionType) -> list[Outside]:
    """The variables with data that a function, or one that it calls, reads from outside of itself."""
    found: dict[tuple[int, str], Outside] = {}
    _add_outside_of(fn, found, {fn})
    return list(found.values())


def _add_outside_of(fn: FunctionType, found: dict[tuple[int, str], Outside], seen: set[FunctionType]) -> None:
    cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
    variables = [Outside(f"closed-over {name}", name, cell, {}) for name, cell in cells]
    variables += [
        Outside(f"global {name}", name, None, fn.__globals__)
        for name in _globals_named(fn.__code__)
        if name in fn.__globals__
    ]
    for variable in variables:
        try:
            value = variable.value()
        except ValueError:  # nothing is in the cell yet
            continue
        if isinstance(value, FunctionType) and value not in seen and not _is_library(value):
            seen.add(value)
            _add_outside_of(inspect.unwrap(value), found, seen)
        if not isinstance(value, _CODE):
            found[id(variable.scope if variable.cell is None else variable.cell), variable.variable] = variable


def _is_library(fn: FunctionType) -> bool:
    return fn.__module__ is not None and fn.__module__.partition(".")[0] in ("torch", "functools", "math")


def _globals_named(code: CodeType) -> Iterator[str]:
    for one in nested_code(code):
        names = (each.argval for each in dis.get_instructions(one) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
        yield from dict.fromkeys(names)


class FunctionImpl:
    """A function as an implementation. What it reads from outside of itself comes in front of its arguments."""

    provider = NATIVE

    def __init__(self, fn: FunctionType, outside: Sequence[Outside]) -> None:
        self.impl_fn = fn
        self.outside = outside

    def func_impl_fn(self, *args: Any, **kwargs: Any) -> Any:
        count = len(self.outside)
        return self._with(args[:count])(*args[count:], **kwargs)

    def _with(self, values: Sequence[Any]) -> Callable[..., Any]:
        """The function, which reads these values outside of itself."""
        if not values:
            return self.impl_fn
        fn = self.impl_fn
        cells = {id(one.cell): CellType(value) for one, value in zip(self.outside, values, strict=True) if one.cell}
        read = {
            one.variable: value for one, value in zip(self.outside, values, strict=True) if one.scope is fn.__globals__
        }
        closure = tuple(cells.get(id(cell), cell) for cell in fn.__closure__ or ())
        rebuilt = FunctionType(fn.__code__, {**fn.__globals__, **read}, fn.__name__, fn.__defaults__, closure)
        rebuilt.__kwdefaults__ = fn.__kwdefaults__
        return rebuilt


_numbers = itertools.count()


class Native:
    """A function that runs compiled inside a mode; an op that is called past torch's dispatcher.

    Attributes:
        name: ``module.qualname``, with a number if another function has that name.
        number: no other function of the process has, or had, it.
        module: the function's module.
        activations: the parameters whose dimension 0 is the token dimension.
    """

    registry: ClassVar[weakref.WeakValueDictionary[str, Native]] = weakref.WeakValueDictionary()

    def __init__(
        self, fn: FunctionType, name: str, activations: Sequence[str] | None, mutates_args: Sequence[str]
    ) -> None:
        signature = inspect.signature(fn)
        names = list(signature.parameters)
        for what, given in (("activations", activations or ()), ("mutates_args", mutates_args)):
            missing = [one for one in given if one not in names]
            if missing:
                raise ValueError(f"native: {name}: {what} {missing} are not among the parameters {names}")
        self.name = name
        self.number = next(_numbers)
        self.module = fn.__module__
        self.fn = fn
        self.activations = [one for one in names if one.startswith("x")] if activations is None else list(activations)
        self._automatic = activations is None
        self._written = frozenset(mutates_args) or None
        self.signature = signature
        self._impl: FunctionImpl | None = None

    def __repr__(self) -> str:
        return f"Native({self.name!r})"

    @property
    def impl(self) -> FunctionImpl:
        """The function as an implementation. Made at the first call: what it reads may be defined after it."""
        with _lock:
            if self._impl is None:
                self._impl = FunctionImpl(self.fn, outside_of(self.fn))
            return self._impl

    def outside(self) -> list[Any]:
        """What the function would read from outside of itself now.

        Raises:
            ValueError, KeyError: something has no value.
        """
        return [one.value() for one in (self._impl or self.impl).outside]

    def dispatch(self, *args: Any, **kwargs: Any) -> FunctionImpl:
        return self.impl

    @property
    def callee(self) -> Callee:
        """The function as a route calls it. It does not keep the function alive."""
        reference, count = weakref.ref(self), len(self.impl.outside)

        def run(keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            native = reference()
            assert native is not None, "whoever calls it holds it"
            return native.fn(*args[count:], **kwargs)

        parameters = Parameters.of_signature(
            self.signature,
            [one.name for one in self.impl.outside],
            self.activations,
            self._automatic,
            self._written,
        )
        return Callee(self.name, self.name, parameters, run, self.signature)

    def caller(self) -> Callable[..., Any]:
        """The function that takes the place of the decorated one."""
        fn, number, innermost = self.fn, self.number, innermost_entry

        @functools.wraps(fn)
        def native(*args: Any, **kwargs: Any) -> Any:
            if is_dynamo_compiling():
                return fn(*args, **kwargs)
            entry = innermost()
            if entry.mode is None and entry.outside is None:
                if entry.captures is not None:
                    entry.captures(self.name)
                return fn(*args, **kwargs)
            if (self._impl or self.impl).outside:
                try:
                    args = (*self.outside(), *args)
                except (ValueError, KeyError):
                    return fn(*args, **kwargs)
            mode = entry.untraced
            if mode is not None and not profiler._is_profiler_enabled:
                route = mode.routes.get(number)
                if route is None:
                    route = route_outside(entry, number)
                table = None if route is None else route.last[1]
                if route is not None and table is not None:
                    try:
                        for call in table.calls:
                            result = call(args, kwargs)
                            if result is not MISS:
                                route.counters.hits += 1
                                return result
                    except Exception as error:
                        return route.run_after_error(None, args, kwargs, error, call)
            return run_function(self, args, kwargs)

        native.dispatch_compile_native = self  # type: ignore[attr-defined]
        return native


_lock = freed_in_children(threading.RLock())


@overload
def native(fn: F) -> F: ...


@overload
def native(
    fn: None = None,
    *,
    activations: Sequence[str] | None = None,
    mutates_args: Sequence[str] = (),
    name: str | None = None,
) -> Callable[[F], F]: ...


def native(
    fn: Any = None,
    *,
    activations: Sequence[str] | None = None,
    mutates_args: Sequence[str] = (),
    name: str | None = None,
) -> Any:
    """Decorate a function or method of plain PyTorch, to have it run compiled inside a mode.

    Outside of modes it is the function itself. The same holds while ``torch.compile``, ``torch.export``, ``make_fx`` or
    fake tensors trace: they see its ops, and fuse them with the ops around it.

    >>> @dc.native
    ... def gate(x, g, limit=7.0):
    ...     return torch.sigmoid(g.clamp(max=limit)) * x
    >>> with dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), trace=True) as mode:
    ...     for tokens in (8, 16, 300):
    ...         y = gate(torch.ones(tokens, 64), torch.ones(tokens, 64))
    >>> for event in mode.trace.events:
    ...     print(event.action, event.specialization, "new" if event.new else "reused")
    compiled [8, 64], [8, 64] new
    compiled [s0, 64], [s0, 64] new
    compiled [s0, 64], [s0, 64] reused

    ``layer.forward = dc.native(layer.forward)`` does it to a layer of somebody else's.

    The function needs no type hints. Its arguments may be tensors, numbers, strings, ``None``, dtypes, enums, lists,
    tuples and dictionaries of these, and objects, such as a method's ``self``. Tensors that it reads from an object are
    inputs of the code, so all layers of a class share it; other attributes that it reads are guarded. Closed-over
    variables and globals are treated the same way. The functions and classes that it calls are assumed not to change.
    It may return tensors, ``None``, numbers, and tuples, lists, dictionaries and dataclasses of these.

    Args:
        fn: a function; a method, also a bound one; a ``functools.partial``; or what ``torch.compile`` returned for one
            of these: then the original is taken.
        activations: the parameters whose dimension 0 is the token dimension. It is dynamic from the first call, unless
            the function ties it to a size that is not. By default these are the parameters whose names start with
            ``x``, and dimension 0 of any other tensor becomes dynamic once it changes.
        mutates_args: the parameters that the function writes to, or whose contents it writes to. By default this is
            detected. If you give it, a function that writes to another parameter is not compiled.
        name: the name in traces and counters; by default ``module.qualname``.

    Returns:
        The function to call instead; without ``fn``, the decorator.

    Raises:
        TypeError: ``fn`` is a generator or coroutine function, a class, a module, an op, a builtin, or not callable;
            ``activations`` or ``mutates_args`` is not a list of names; ``name`` is not a string.
        ValueError: ``activations`` or ``mutates_args`` names something that is not a parameter.
    """
    if activations is not None:
        activations = checked_names("native", "activations", activations)
    mutates_args = checked_names("native", "mutates_args", mutates_args)
    if name is not None and not isinstance(name, str):
        raise TypeError(f"native: name must be a string, not {name!r}")

    def decorate(given: Any) -> Any:
        return _decorated(given, activations, mutates_args, name)

    return decorate if fn is None else decorate(fn)


def _decorated(fn: Any, activations: tuple[str, ...] | None, mutates_args: tuple[str, ...], name: str | None) -> Any:
    fn = uncompiled(fn)
    if isinstance(fn, (staticmethod, classmethod)):
        return type(fn)(_decorated(fn.__func__, activations, mutates_args, name))
    if isinstance(fn, functools.partial):
        inner, partial = _decorated(fn.func, activations, mutates_args, name), fn

        @functools.wraps(partial.func)
        def with_partial(*args: Any, **kwargs: Any) -> Any:
            return inner(*partial.args, *args, **{**partial.keywords, **kwargs})

        with_partial.__signature__ = inspect.signature(partial)  # type: ignore[attr-defined]
        return with_partial
    if isinstance(fn, MethodType):
        method, instance = _decorated(fn.__func__, activations, mutates_args, name), fn.__self__

        @functools.wraps(fn)
        def bound(*args: Any, **kwargs: Any) -> Any:
            return method(instance, *args, **kwargs)

        return bound
    _check(fn)
    if hasattr(fn, "dispatch_compile_native"):
        return fn
    options = (activations, mutates_args, name)
    with _lock:
        natives: dict[Hashable, Native] = vars(fn).setdefault(NATIVES_OF, {})
        found = natives.get(options)
        if found is None:
            full_name = _free_name(name or f"{fn.__module__}.{fn.__qualname__}")
            found = natives[options] = Native(fn, full_name, activations, mutates_args)
            Native.registry[full_name] = found
    return found.caller()


def _free_name(name: str) -> str:
    taken = set(Native.registry)
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}#{number}"
    return free


def _check(fn: Any) -> None:
    if isinstance(fn, torch.nn.Module):
        raise TypeError(
            f"native: a {type(fn).__name__} is a module; give its method, module.forward = native(module.forward), or "
            f"decorate forward in its class"
        )
    if isinstance(fn, type):
        raise TypeError(f"native: {fn.__name__} is a class; decorate the methods that compute")
    if isinstance(fn, (OpOverload, OpOverloadPacket, CustomOpDef, IrOp)):
        raise TypeError(f"native: {fn} is an op; give it a reference implementation with register_native")
    if not callable(fn):
        raise TypeError(f"native: {fn!r} cannot be called; give it a function")
    if not isinstance(fn, FunctionType):
        raise TypeError(f"native: {fn!r} is not written in Python, so it cannot be traced; wrap it in a function")
    kinds = {
        "a coroutine function (async def)": inspect.iscoroutinefunction(fn),
        "a generator function": inspect.isgeneratorfunction(fn),
        "an asynchronous generator function": inspect.isasyncgenfunction(fn),
    }
    for kind, is_it in kinds.items():
        if is_it:
            raise TypeError(
                f"native: {fn.__qualname__} is {kind}, which does not compute when it is called; "
                f"decorate a plain function that it calls"
            )


registry.add_source(lambda: list(Native.registry.values()))
