"""Finding every lock that the package holds, wherever it holds it."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import sys
import threading
import types
from collections.abc import Iterable, Iterator
from typing import Any

import dispatch_compile

LOCKS = (type(threading.Lock()), type(threading.RLock()))


def locks_of_the_package() -> list[Any]:
    """The locks of the package: of its imported modules, and of everything alive that is of their classes."""
    return list(locks_in(name for name in list(sys.modules) if _is_in_package(name)))


def locks_in(modules: Iterable[str]) -> Iterator[Any]:
    """The locks in these modules' variables, in their functions and classes, and in the instances of their classes."""
    names = set(modules)
    waiting: list[Any] = [vars(sys.modules[name]) for name in names]
    waiting += [thing for thing in gc.get_objects() if type(thing).__module__ in names]
    seen: dict[int, Any] = {}
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, LOCKS):
            yield thing
        elif _is_looked_into(thing, names):
            waiting += [part for part in gc.get_referents(thing) if part is not getattr(thing, "__globals__", None)]


def _is_looked_into(thing: Any, names: set[str]) -> bool:
    """Whether what the thing refers to is the modules' own: not other modules, nor what those define."""
    if isinstance(thing, (types.ModuleType, threading.Thread)):  # Python itself frees a thread's locks in a child
        return False
    if isinstance(thing, (type, types.FunctionType)):
        return thing.__module__ in names
    kind = type(thing)
    return kind.__module__ in names or kind.__module__ in _OF_CONTAINERS


_OF_CONTAINERS = {
    "builtins",
    "collections",
    "functools",
    "weakref",
    "_weakrefset",
    "queue",
    "_queue",
    "threading",
    "types",
}


def import_the_package() -> None:
    """Import every module of it, but for those that need a library that is not here."""
    for module in pkgutil.walk_packages(dispatch_compile.__path__, "dispatch_compile."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def _is_in_package(name: str) -> bool:
    return name.partition(".")[0] == "dispatch_compile"
