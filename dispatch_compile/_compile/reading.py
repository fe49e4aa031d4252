"""What a function may read: its globals, and what it reads of modules, found in its bytecode."""

from __future__ import annotations

import builtins
import dis
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any


class CannotTell(Exception):
    """It is unknown what a function reads, or what code was made of; the message says why."""


def globals_read(function: FunctionType) -> dict[str, Any]:
    """The globals that a function or a function inside of it reads, and what it reads of modules, by dotted name."""
    scope = {**vars(builtins), **function.__globals__}
    found: dict[str, Any] = {}
    for code in nested_code(function.__code__):
        instructions = [each for each in dis.get_instructions(code) if each.opname != "EXTENDED_ARG"]
        for i, instruction in enumerate(instructions):
            if instruction.opname == "IMPORT_NAME":
                _check_import(instruction.argval, level=instructions[i - 2].argval)
            elif instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                name, value = _attribute(instruction.argval, scope, instructions[i + 1 :])
                found[name] = value
    return dict(sorted(found.items()))


def _check_import(module: str, level: int) -> None:
    if level or module.partition(".")[0] != "torch":
        raise CannotTell(f"it imports {'.' * level}{module} when it is called")


def _attribute(name: str, scope: Mapping[str, Any], rest: Iterable[dis.Instruction]) -> tuple[str, Any]:
    """Follow the attributes of modules that the next instructions load."""
    if name not in scope:
        raise CannotTell(f"{name} has no value yet")
    value = scope[name]
    for instruction in rest:
        if not isinstance(value, ModuleType) or instruction.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            break
        name = f"{name}.{instruction.argval}"
        if not hasattr(value, instruction.argval):
            raise CannotTell(f"{name} has no value yet")
        value = getattr(value, instruction.argval)
    return name, value


def nested_code(code: CodeType) -> Iterator[CodeType]:
    """A code object, and those of the functions inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested_code(constant)
