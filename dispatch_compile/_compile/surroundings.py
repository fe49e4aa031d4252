"""What a function, and those that it calls, read of the program around them while it is captured: code that is made
of it is right as long as they would read the same.

Tensors among the arguments, numbers that the function itself reads, and the like are inputs; see ``_native``. The rest
is watched: the functions and classes that are called by a name, attributes of modules and classes, and what helpers
read. A function whose effect is not in its graph (it prints, reads a clock, sets a global) is not to be compiled.
"""

from __future__ import annotations

import builtins
import dis
import functools
import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import CellType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch

from .._ir.protocol import Impl
from .._specialize.arguments import CONSTANTS
from .._specialize.stand_ins import StepAside
from .reading import CannotTell, nested_code

_MISSING = object()
_COPIES = ("COPY", "DUP_TOP")  # in front of K.count += 1

# Their functions stay what they are, and read nothing that a caller changes between calls.
_TRUSTED = ("torch", "sympy", "mpmath", "numpy", "dispatch_compile")
# What torch needs: it lands in these in the middle of a capture.
_OF_TORCH = ("typing_extensions", "networkx", "jinja2", "markupsafe", "fsspec", "filelock", "optree", "triton")
_LIBRARIES = frozenset({*_TRUSTED, *_OF_TORCH, *sys.stdlib_module_names})

# What ``functools.cache`` makes.
CACHING = type(functools.cache(lambda: None))

# What these give, or do, is not in a graph.
_IMPURE_MODULES = frozenset({"os", "posix", "time", "datetime", "random", "_random", "secrets", "uuid", "_warnings"})
_IMPURE_BUILTINS = frozenset({print, input, open, exec, eval, globals, id})


@dataclass(frozen=True)
class _Scope:
    """Where names are looked up: a function's globals, or what it closes over.

    Attributes:
        names: what is there now.
        again: finds it again, or None; keeps nothing alive. None if what is there is taken to stay.
        module: the module whose globals they are, if there is one.
    """

    names: dict[str, Any]
    again: Callable[[], dict[str, Any] | None] | None
    module: str | None = None

    @staticmethod
    def globals_of(names: dict[str, Any], fn: FunctionType) -> _Scope:
        module = sys.modules.get(names.get("__name__") or "")
        if module is not None and vars(module) is names:
            return _Scope(names, _globals_again(module), module.__name__)
        return _Scope(names, _globals_again(fn) if fn.__globals__ is names else lambda: names)

    @staticmethod
    def closure_of(fn: FunctionType, names: dict[str, Any]) -> _Scope:
        """What a function closes over, of these names."""
        reference = weakref.ref(fn)

        def again() -> dict[str, Any] | None:
            one = reference()
            return None if one is None else {name: cell.cell_contents for name, cell in _cells(one)}

        return _Scope(names, again)

    @staticmethod
    def fixed(name: str, value: Any) -> _Scope:
        """A variable that a function closes over which is not at hand: only what is in it may change."""
        if not isinstance(value, (ModuleType, type)):
            return _Scope({name: value}, None)
        reference = weakref.ref(value)
        return _Scope({name: value}, lambda: {name: reference()})


def _cells(fn: FunctionType) -> Iterator[tuple[str, CellType]]:
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        if cell != _EMPTY:
            yield name, cell


_EMPTY = CellType()


@dataclass(frozen=True)
class _Read:
    """Something that was read: ``path`` is its way from the globals of a module, whose name is ``module``, if any."""

    module: str | None
    scope: Callable[[], dict[str, Any] | None]
    path: tuple[str, ...]
    same: Callable[[Any], bool]

    def holds(self) -> bool:
        scope = self.scope()
        return scope is not None and self.same(_value_at(scope, self.path))


class Surroundings:
    """What was read, as it was. Neither modules, functions nor classes are kept alive."""

    def __init__(self, reads: tuple[_Read, ...] = ()) -> None:
        self._reads = reads

    def __bool__(self) -> bool:
        return bool(self._reads)

    def hold(self) -> bool:
        """Whether it is as it was; called with every call of the compiled code."""
        return all(read.holds() for read in self._reads)

    def changed(self) -> str:
        """The name of what is not as it was."""
        return next(".".join(read.path) for read in self._reads if not read.holds())

    def names(self) -> tuple[str, ...]:
        """What was read, for another process.

        Raises:
            CannotTell: another process could not find it.
        """
        unnamed = [".".join(read.path) for read in self._reads if read.module is None]
        if unnamed:
            raise CannotTell(f"it reads {', '.join(unnamed)}, which is in no module")
        return tuple(f"{read.module}:{'.'.join(read.path)}" for read in self._reads)

    @staticmethod
    def again(names: Iterable[str]) -> Surroundings:
        """What was read in another process, as it is here now.

        Raises:
            KeyError: a module is not imported.
        """
        reads = []
        for name in names:
            module, _, dotted = name.partition(":")
            scope, path = vars(sys.modules[module]), tuple(dotted.split("."))
            reads.append(_Read(module, _globals_again(sys.modules[module]), path, _sameness(_value_at(scope, path))))
        return Surroundings(tuple(reads))


NOTHING_READ = Surroundings()


class Watch:
    """Around a function while it runs for a capture."""

    def __init__(self, fn: FunctionType, known: set[tuple[int, str]], closed: set[str]) -> None:
        self._fn = fn
        self._known = known  # globals that are inputs or guarded already, by the id of their dictionary
        self._closed = closed  # and variables that the function closes over
        self._reason: StepAside | None = None
        self._seen: set[CodeType] = set()
        self._own: set[CodeType] = set()  # codes that belong to the program, not to a library
        self._nested: set[CodeType] = set()
        self._copied: dict[str, Any] | None = None  # the globals with which the function runs
        self._caches: list[tuple[Any, int]] = []  # with how often something was put into each
        self._before: dict[tuple[int, tuple[str, ...]], tuple[_Scope, Any, Any]] = {}

    def __enter__(self) -> Watch:
        # What a collection runs (gc.callbacks, finalizers) is not the function's doing.
        self._collects = gc.isenabled()
        gc.disable()
        self._profile = sys.getprofile()
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._profile)
        if self._collects:
            gc.enable()
        changed = [path for scope, path, before in self._looked_at() if self._restored(scope, path, before)]
        for cache, misses in self._caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()  # of fake tensors
        if self._reason is not None:
            raise self._reason
        if changed:
            raise StepAside(f"the implementation changes {'.'.join(changed[0])}")

    def surroundings(self) -> Surroundings:
        """What was read, to be compared later."""
        reads = []
        for scope, path, (_, value) in self._looked_at():
            known = (id(scope.names), path[0]) in self._known or isinstance(value, torch.Tensor)
            if scope.again is not None and not known:
                reads.append(_Read(scope.module, scope.again, path, _sameness(value)))
        return Surroundings(tuple(reads))

    def tensors(self) -> list[str]:
        """The tensors that were read, by name."""
        return [".".join(path) for _, path, (_, value) in self._looked_at() if isinstance(value, torch.Tensor)]

    def _looked_at(self) -> Iterator[tuple[_Scope, tuple[str, ...], tuple[Any, Any]]]:
        for (_, path), (scope, contents, value) in self._before.items():
            yield scope, path, (contents, value)

    def _event(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event == "call":
            if code not in self._seen and not _in_attribute_of_module(frame):
                self._seen.add(code)
                self._look(frame)
        elif event == "c_call" and code in self._own and _is_impure(arg):
            self._refuse(f"calls {getattr(arg, '__qualname__', arg)}")

    def _look(self, frame: FrameType) -> None:
        code, scope = frame.f_code, frame.f_globals
        module = scope.get("__name__") or ""
        root = module.partition(".")[0]
        if root in _LIBRARIES or root.startswith("namedtuple_"):
            impure = root in _IMPURE_MODULES or (root == "logging" and code.co_name == "handle")
            if impure and _caller(frame) not in _TRUSTED:
                self._refuse(f"calls {module}.{getattr(code, 'co_qualname', code.co_name)}")
            return
        if code is self._fn.__code__:
            self._copied = scope
        if scope is self._copied:
            scope = self._fn.__globals__
        self._own.add(code)
        inside = code in self._nested
        self._nested.update(nested_code(code))
        outer = _Scope.globals_of(scope, self._fn)
        closed = {} if inside else {name: frame.f_locals[name] for name in code.co_freevars if name in frame.f_locals}
        if code is self._fn.__code__:
            own = {name: value for name, value in closed.items() if name not in self._closed}
            closures = dict.fromkeys(own, _Scope.closure_of(self._fn, own))
        else:
            closures = {name: _Scope.fixed(name, value) for name, value in closed.items()}
        instructions = [each for each in dis.get_instructions(code) if each.opname != "EXTENDED_ARG"]
        for i, instruction in enumerate(instructions):
            name, opname = instruction.argval, instruction.opname
            if opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                self._refuse(f"sets global {name}")
            if opname in ("STORE_DEREF", "DELETE_DEREF") and name in code.co_freevars and not inside:
                self._refuse(f"sets closed-over {name}")
            if opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                self._note(outer, name, instructions[i + 1 :])
            if opname in ("LOAD_DEREF", "LOAD_CLASSDEREF") and name in closures:
                self._note(closures[name], name, instructions[i + 1 :])

    def _note(self, scope: _Scope, name: str, rest: list[dis.Instruction]) -> None:
        if name not in scope.names:
            if getattr(builtins, name, None) is type:
                self._refuse("asks for the type() of something, which is another one in a capture; use isinstance")
            return
        path: tuple[str, ...] = (name,)
        value = scope.names[name]
        for instruction in rest:
            if instruction.opname in _COPIES:
                continue
            if instruction.opname not in ("LOAD_ATTR", "LOAD_METHOD") or not isinstance(value, (ModuleType, type)):
                break
            if isinstance(value, ModuleType) and _is_library(value.__name__):
                return
            path, value = (*path, instruction.argval), getattr(value, instruction.argval, _MISSING)
        if isinstance(value, ModuleType) and _is_library(value.__name__):
            return
        if isinstance(value, CACHING):
            self._caches.append((value, value.cache_info().misses))
        self._before.setdefault((id(scope.names), path), (scope, _contents(value), value))

    def _restored(self, scope: _Scope, path: tuple[str, ...], before: tuple[Any, Any]) -> bool:
        """Whether something was changed; it is as before then, lest fake tensors stay in it."""
        contents, value = before
        now = _value_at(scope.names, path)
        changed = not _equal(now, value) or not _equal(_contents(now), contents)
        if changed and now is not value and len(path) > 1 and value is not _MISSING:
            setattr(_value_at(scope.names, path[:-1]), path[-1], value)
        if changed and isinstance(value, (dict, set, list)):
            value.clear()
            value.extend(contents) if isinstance(value, list) else value.update(contents)
        return changed

    def _refuse(self, what: str) -> None:
        """End the run: what is to be called must not be."""
        self._reason = StepAside(f"the implementation {what}")
        raise self._reason


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES


def _in_attribute_of_module(frame: FrameType | None) -> bool:
    """Whether a module computes an attribute: that is compared as a whole, by asking for it again."""
    while frame is not None:
        if frame.f_code.co_name == "__getattr__" and frame.f_code.co_argcount == 1:
            return True
        frame = frame.f_back
    return False


def _caller(frame: FrameType) -> str:
    """The package of what called a function of Python's own library."""
    caller = frame.f_back
    while caller is not None:
        root = (caller.f_globals.get("__name__") or "").partition(".")[0]
        if root not in sys.stdlib_module_names:
            return str(root)
        caller = caller.f_back
    return ""


def _is_impure(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    module = (type(owner) if owner is not None and not isinstance(owner, ModuleType) else function).__module__ or ""
    return function in _IMPURE_BUILTINS if module == "builtins" else module in _IMPURE_MODULES


def _value_at(scope: dict[str, Any], path: tuple[str, ...]) -> Any:
    value = scope.get(path[0], _MISSING)
    for name in path[1:]:
        value = getattr(value, name, _MISSING)
    return value


def _contents(value: Any) -> Any:
    """What a list, a dictionary or a set holds, else the value."""
    return type(value)(value) if type(value) in (list, dict, set) else value


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are the same, as far as a program can tell that does not change what is in lists of lists."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if type(one) is dict:
        return list(one) == list(other) and all(map(_equal, one.values(), other.values()))
    if type(one) in (list, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(one, (*CONSTANTS, set, frozenset)) and repr(one) == repr(other)


def _sameness(value: Any) -> Callable[[Any], bool]:
    if isinstance(value, (dict, list, set, tuple)) or value is None or value is _MISSING:
        contents = _contents(value)
        return lambda now: _equal(now, contents)
    try:
        reference = weakref.ref(value)
    except TypeError:
        return lambda now: _equal(now, value)
    return lambda now: now is not _MISSING and reference() is now


def _globals_again(owner: ModuleType | FunctionType) -> Callable[[], dict[str, Any] | None]:
    """The globals of a module or function, which is not kept alive."""
    reference: weakref.ref[Any] = weakref.ref(owner)

    def found() -> dict[str, Any] | None:
        one = reference()
        return None if one is None else vars(one) if isinstance(one, ModuleType) else one.__globals__

    return found


def watch_of(impl: Impl) -> Watch | None:
    """The watch for an implementation that is a function, as ``native`` makes one; ops have to mind by themselves."""
    outside, fn = getattr(impl, "outside", None), getattr(impl, "impl_fn", None)
    if outside is None or fn is None:
        return None
    return Watch(
        fn,
        {(id(one.scope), one.variable) for one in outside if one.cell is None},
        {one.variable for one in outside if one.cell is not None},
    )
