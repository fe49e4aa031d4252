"""Compiled code as data: what one process needs to run what another one compiled, without a compiler or Inductor.

Inductor's code is a Python module that imports most of Inductor, which takes seconds, though the function that runs
hardly needs any of it. A :class:`Program` is the part of that module on which the function depends, as text, and the
machine code of the kernels that it calls.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .._compile.program import Program, names_defined_by
from .._torch.inductor import InductorCode
from .._torch.saved_code import (
    TritonLaunch,
    cpp_kernel_library,
    generated_module,
    triton_launch,
)
from .origin import CannotSave


def program_of(code: InductorCode) -> Program:
    """Take Inductor's code apart.

    Raises:
        CannotSave: it needs something that cannot be written to a file.
    """
    found = generated_module(code.run)
    if found is None:
        raise CannotSave("Inductor's code is wrapped in something else")
    module, realigned = found
    statements, kernels = _needed(code.source)
    text = ast.unparse(ast.Module(statements, type_ignores=[]))
    _check_text_alone_defines(statements, module, names_defined_by(text, {name: module[name] for name in kernels}))
    cpp: dict[str, bytes] = {}
    triton: dict[str, TritonLaunch] = {}
    for name, maker in kernels.items():
        if maker == "cpp_pybinding" and (library := cpp_kernel_library(module[name])) is not None:
            cpp[name] = library
        elif maker == "triton" and (launch := triton_launch(module[name])) is not None:
            triton[name] = launch
        else:
            raise CannotSave(f"its kernel {name} ({maker}) cannot be taken out of this process")
    return Program(text, cpp, triton, realigned)


def _needed(source: str) -> tuple[list[ast.stmt], dict[str, str]]:
    """The statements of a generated module on which ``call`` depends, but for those that make kernels, and the makers
    of these by name: the methods of Inductor's AsyncCompile."""
    body = ast.parse(source).body
    binding: dict[str, list[ast.stmt]] = {}
    for statement in body:
        for name in _bound(statement):
            binding.setdefault(name, []).append(statement)
    kernels: dict[str, str] = {}
    kept: list[ast.stmt] = []
    names = ["call"]
    while names:
        name = names.pop()
        for statement in binding.pop(name, ()):
            maker = _kernel_maker(statement)
            if maker is not None:
                kernels[name] = maker
            elif statement not in kept:
                kept.append(statement)
                names += [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return [statement for statement in body if statement in kept], kernels


def _bound(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in statement.names)
    elif isinstance(statement, ast.Assign):
        yield from (node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name))
    elif isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        yield statement.name


def _kernel_maker(statement: ast.stmt) -> str | None:
    match statement:
        case ast.Assign(value=ast.Call(func=ast.Attribute(value=ast.Name(id="async_compile"), attr=maker))):
            return maker
    return None


def _check_text_alone_defines(
    statements: Sequence[ast.stmt], module: Mapping[str, Any], rebuilt: Mapping[str, Any]
) -> None:
    """Constants, such as tensors, are put into the module from outside; the text leaves None in their place."""
    for name in (name for statement in statements for name in _bound(statement)):
        if type(module[name]).__qualname__ != type(rebuilt[name]).__qualname__:
            raise CannotSave(f"its constant {name} is a {type(module[name]).__name__}")
