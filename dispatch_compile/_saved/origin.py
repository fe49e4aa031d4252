"""What compiled code was made of, as text that another process can compare: the implementation, with everything of
the program that it reads, what was asked of the compiler, and what the machine and its software are.

An implementation is described by its code objects, not by its source file: the file may have been edited since it was
imported, and what runs is the code object. With it go the defaults, the closure and the globals that it reads, and
so on through the functions that it calls. What belongs to torch or to Python is described by its name, since their
versions are compared as well. What none of these rules describes cannot be saved.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch

from .._compile.config import CompileConfig
from .._compile.reading import CannotTell, globals_read
from .._ir import registry
from .._ir.protocol import Impl, TorchOp, implementations_tried, supports_args_of
from .._torch.dispatch import OpOverload, OpOverloadPacket
from .._torch.saved_code import inductor_overrides

# The attribute of a function that has what was made of it by ``native``: it lives as long as the function.
NATIVES_OF = "dispatch_compile_natives"


class CannotSave(CannotTell):
    """Code cannot be saved: it was made of something that cannot be described, or cannot be taken apart."""


@dataclass(frozen=True)
class Origin:
    """What code was made of, but for the arguments and the machine. Code of equal origins is the same."""

    op: str  # ns::name, or a function's module.qualname
    provider: str
    implementation: str  # digest of everything that it can read
    options: str  # what the user asks of Inductor for this code
    settings: str  # what else the process and its environment ask of Inductor
    ops: str  # the IR ops that the implementation may call, which are described with it


def origin_of(name: str, impl: Impl, config: CompileConfig) -> Origin:
    """Describe what code compiled now would be made of.

    Raises:
        CannotTell: another process could not tell whether it has the same.
    """
    if config.backend != "inductor":
        raise CannotSave(f"backend {config.backend!r} is not Inductor")
    function = getattr(impl, "impl_fn", None)
    if function is None or getattr(impl, "inplace", False):
        raise CannotSave("its implementation is not a function of its arguments alone")
    description = _Description(config.providers)
    texts = [description.of(function, "the implementation"), *description.ops_of_torch()]
    return Origin(
        op=name,
        provider=impl.provider,
        implementation=digest("; ".join(texts)),
        options=_Description().of((config.bitwise, dict(sorted(config.options.items()))), "options"),
        settings=_settings(),
        ops=" ".join(description.ops),
    )


def digest(text: str) -> str:
    """A short name for a text that no other text has."""
    return hashlib.sha256(text.encode()).hexdigest()


# ---- The implementation


_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_TORCH_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format)

# What is described by its name: it does the same as long as the version is the same. Of Python's own library these
# are the modules that read nothing but their arguments.
_VERSIONED = frozenset({"torch", "builtins", "cmath", "collections", "functools", "itertools", "math", "operator"})
_OPS_OF_TORCH = frozenset({"aten", "prims"})
_READ_ANYTHING = frozenset({"__import__", "eval", "exec", "globals", "input", "locals", "open", "vars"})


class _Description:
    """Text that is equal for two values only if an implementation cannot tell them apart."""

    def __init__(self, providers: Collection[str] = ()) -> None:
        self._providers = providers
        self._functions: dict[FunctionType, int] = {}  # functions may call each other
        self.ops: dict[str, None] = {}  # the IR ops described so far, as ns::name

    def of(self, value: Any, where: str) -> str:
        """Describe a value that is found at ``where``, for people."""
        kind = type(value)
        if kind in _PLAIN or kind in _TORCH_PLAIN:
            return f"{kind.__name__} {value!r}"
        if kind in (tuple, list):
            return f"{kind.__name__}({', '.join(self.of(item, where) for item in value)})"
        if kind in (set, frozenset):
            return f"{kind.__name__}({', '.join(sorted(self.of(item, where) for item in value))})"
        if kind is dict:
            items = (f"{self.of(key, where)}: {self.of(item, where)}" for key, item in value.items())
            return f"dict({', '.join(items)})"
        if kind is slice:
            return f"slice {self.of((value.start, value.stop, value.step), where)}"
        if kind is CodeType:
            return self._code(value, where)
        if kind is FunctionType:
            return self._function(value, where)
        op = registry.op_meant_by(value)
        if op is not None:
            return self._op(op)
        name = _versioned_name(value)
        if name is None:
            raise CannotSave(f"{where} is a {kind.__name__}, which another process cannot compare")
        return name

    def ops_of_torch(self) -> Iterator[str]:
        """Describe the ops of torch that are IR ops here: functions of torch may call them."""
        for op in registry.torch_ops():
            if op.torch_op.namespace in _OPS_OF_TORCH:
                yield self._op(op)

    def _op(self, op: TorchOp) -> str:
        """Describe what a call of an IR op may come to, which is a part of the code if it is to be compiled."""
        name = op.torch_op._schema.name
        if name in self.ops:
            return f"op {name}"
        self.ops[name] = None
        tried = [self._impl(impl, f"an implementation of {name}") for impl in implementations_tried(op)]
        return f"op {op.torch_op._schema} {op.activations} [{'; '.join(tried)}]"

    def _impl(self, impl: Impl, where: str) -> str:
        compiled = impl.provider in self._providers
        read = (impl.impl_fn if compiled else None, getattr(impl, "inplace", False), supports_args_of(impl))
        return f"{impl.provider} {compiled} {self.of(read, where)}"

    def _function(self, function: FunctionType, where: str) -> str:
        if function in self._functions:
            return f"function {self._functions[function]}"
        number = self._functions[function] = len(self._functions)
        code, module = function.__code__, function.__globals__.get("__name__", "")
        if _is_versioned(module):
            parts = [f"{module}.{function.__qualname__} {code.co_name} {code.co_firstlineno}"]
        else:
            attributes = {name: value for name, value in vars(function).items() if name != NATIVES_OF}
            parts = [self._code(code, where), self.of(attributes, f"an attribute of {where}")]
            parts += [f"{name} = {self.of(value, name)}" for name, value in globals_read(function).items()]
        parts.append(self.of((function.__defaults__, function.__kwdefaults__), f"a default of {where}"))
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            parts.append(f"{name} = {self.of(_contents(cell, name), name)}")
        return f"function {number} {{{'; '.join(parts)}}}"

    def _code(self, code: CodeType, where: str) -> str:
        fields = (
            code.co_code,
            code.co_consts,
            code.co_names,
            code.co_varnames,
            code.co_freevars,
            code.co_cellvars,
            code.co_flags,
            code.co_argcount,
            code.co_posonlyargcount,
            code.co_kwonlyargcount,
            getattr(code, "co_exceptiontable", b""),  # from Python 3.11 on
        )
        return f"code {self.of(fields, where)}"


def _contents(cell: CellType, name: str) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        raise CannotSave(f"{name} has no value yet") from None


def _versioned_name(value: Any) -> str | None:
    """The name of something that belongs to torch or to Python, whose versions are compared."""
    if isinstance(value, (OpOverload, OpOverloadPacket)):
        return f"op {value}" if str(value).partition(".")[0] in _OPS_OF_TORCH else None
    if isinstance(value, ModuleType):
        return f"module {value.__name__}" if _is_versioned(value.__name__) else None
    if isinstance(value, type):
        return f"class {value.__module__}.{value.__qualname__}" if _is_versioned(value.__module__) else None
    if isinstance(value, BuiltinFunctionType) and value.__name__ not in _READ_ANYTHING:
        module = value.__module__ or ""  # the methods of objects have none
        return f"builtin {module}.{value.__qualname__}" if _is_versioned(module) else None
    return None


def _is_versioned(module: str) -> bool:
    parts = module.split(".")
    if parts[:2] == ["torch", "ops"]:
        return len(parts) > 2 and parts[2] in _OPS_OF_TORCH  # the others are anybody's
    return parts[0].lstrip("_") in _VERSIONED  # math.sqrt is of math, operator.add of _operator


# ---- What is asked of the compiler


_ASKING = ("TORCHINDUCTOR_", "TRITON_")  # those that end in _DIR only say where files are kept


def _settings() -> str:
    variables = [(name, value) for name, value in os.environ.items() if name.startswith(_ASKING)]
    asked = sorted((name, value) for name, value in variables if not name.endswith("_DIR"))
    return f"{asked} {sorted(inductor_overrides().items())}"


# ---- The machine and its software


def environment(cpu: bool, cuda_devices: frozenset[int]) -> dict[str, str]:
    """What code depends on that has kernels for the CPU, and for these CUDA devices; :func:`now` tells each item."""
    names = ["dispatch_compile", "python", "torch"]
    names += ["cpu", "compiler"] if cpu else []
    names += ["triton", *(f"cuda:{index}" for index in sorted(cuda_devices))] if cuda_devices else []
    return {name: now(name) for name in names}


def now(name: str) -> str:
    """What an item of an :func:`environment` is in this process; ``"none"`` where there is no such thing."""
    kind, _, index = name.partition(":")
    if kind == "cuda":
        return _cuda(int(index))
    if kind == "compiler":
        return _compiler(os.environ.get("CXX", "g++"))  # Inductor's own choice
    known = _FACTS.get(kind)
    return known() if known is not None else "none"


def _python() -> str:
    # C++ kernels are extension modules, and the launchers of Triton kernels are bytecode.
    version = f"{sys.implementation.name} {platform.python_version()}{sys.abiflags}"
    return f"{version} {sys.platform} {platform.machine()}"


def _torch() -> str:
    return f"{torch.__version__} {torch.version.git_version}"


def _sources(folder: Path) -> str:
    """A digest of a package's own modules."""
    return digest(
        "".join(f"{digest(file.read_text())} {file.relative_to(folder)}\n" for file in sorted(folder.rglob("*.py")))
    )[:16]


# Another version of this package may capture, guard or compile otherwise. Read now, while the files are what runs.
_OURS = _sources(Path(__file__).parent.parent)


@cache
def _cpu() -> str:
    """The instruction set that torch uses, and everything by which a compiler knows the CPU: Inductor compiles for
    exactly this one."""
    told = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        first = cpuinfo.read_text().partition("\n\n")[0]
        lines = dict(line.partition(":")[::2] for line in first.splitlines())
        values = {name.strip(): value.strip() for name, value in lines.items()}
        told = f"{values.get('model name', told)} {digest(values.get('flags', values.get('Features', '')))[:16]}"
    return f"{torch.backends.cpu.get_cpu_capability()} {told}"


@cache
def _compiler(command: str) -> str:
    try:
        done = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return done.stdout.partition("\n")[0]


@cache
def _triton() -> str:
    for name in ("triton", "pytorch-triton"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


@cache
def _cuda(index: int) -> str:
    if index >= torch.cuda.device_count():
        return "none"
    device = torch.cuda.get_device_properties(index)
    multiprocessors = device.multi_processor_count  # the slice of a shared device has fewer
    return f"{device.name} sm_{device.major}{device.minor} {multiprocessors} multiprocessors, CUDA {torch.version.cuda}"


_FACTS: Mapping[str, Callable[[], str]] = {
    "dispatch_compile": lambda: _OURS,
    "python": _python,
    "torch": _torch,
    "cpu": _cpu,
    "triton": _triton,
}
