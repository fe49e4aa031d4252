"""Compiled code as data: what one process needs to run what another one compiled, without a compiler or Inductor.

Inductor's code is a Python module that imports most of Inductor, which takes seconds, though the function that runs
hardly needs any of it. A :class:`Program` is the part of that module on which the function depends, as text, and the
machine code of the kernels that it calls.
"""

from __future__ import annotations

import ast
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ._origin import CannotSave, environment
from ._torch_private import (
    InductorCode,
    TritonLaunch,
    cpp_kernel_library,
    generated_module,
    load_cpp_kernel,
    load_triton_kernel,
    triton_launch,
)

Run = Callable[[list[Any]], Sequence[torch.Tensor]]

ALIGNMENT = 16  # bytes; Triton kernels are compiled for inputs that start at a multiple of it


@dataclass(frozen=True)
class Program:
    """A function of a list of inputs, as data.

    Attributes:
        text: Python statements that define ``call``, for which the kernels have their names.
        cpp: C++ kernels by name, each as the bytes of the library that is their Python extension.
        triton: Triton kernels by name.
        realigned: positions of inputs to copy if they do not start at a multiple of :data:`ALIGNMENT`.
    """

    text: str
    cpp: Mapping[str, bytes] = field(default_factory=dict)
    triton: Mapping[str, TritonLaunch] = field(default_factory=dict)
    realigned: tuple[int, ...] = ()

    def environment(self) -> dict[str, str]:
        """What must be the same where it runs; see :func:`._origin.now`."""
        return environment(bool(self.cpp), frozenset(kernel.device for kernel in self.triton.values()))

    def load(self) -> Run:
        """The function itself. What runs is what was saved: only load what you trust."""
        # The loader maps the files, so that they are not needed afterwards.
        with tempfile.TemporaryDirectory(prefix="dispatch_compile_") as folder:
            kernels: dict[str, Any] = {}
            for name, library in self.cpp.items():
                kernels[name] = load_cpp_kernel(_written(folder, library))
            for name, launch in self.triton.items():
                kernels[name] = load_triton_kernel(launch, _written(folder, launch.cubin))
        call = _call(self.text, kernels)["call"]
        return _with_realigned(call, self.realigned) if self.realigned else call


def _written(folder: str, content: bytes) -> str:
    # Named by content: a loader takes files of one name for one library.
    path = Path(folder, hashlib.sha256(content).hexdigest())
    path.write_bytes(content)
    return str(path)


def _call(text: str, kernels: Mapping[str, Any]) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "dispatch_compile_program", **kernels}
    exec(compile(text, "<dispatch_compile program>", "exec"), scope)
    return scope


def _with_realigned(call: Run, positions: Sequence[int]) -> Run:
    def run(inputs: list[Any]) -> Sequence[torch.Tensor]:
        for i in positions:
            if inputs[i].data_ptr() % ALIGNMENT:
                inputs[i] = copy_of(inputs[i])
        return call(inputs)

    return run


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, also where elements share memory."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    memory = tensor.as_strided((span if tensor.numel() else 0,), (1,)).clone()
    return memory.as_strided(tensor.size(), tensor.stride())


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
    _check_text_alone_defines(statements, module, _call(text, {name: module[name] for name in kernels}))
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
