"""Compiled code as data: what a process needs to run it, without a compiler or Inductor."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._torch.saved_code import (
    TritonLaunch,
    load_cpp_kernel,
    load_triton_kernel,
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

    def load(self) -> Run:
        """The function itself. What runs is what was saved: only load what you trust."""
        # The loader maps the files, so that they are not needed afterwards.
        with tempfile.TemporaryDirectory(prefix="dispatch_compile_") as folder:
            kernels: dict[str, Any] = {}
            for name, library in self.cpp.items():
                kernels[name] = load_cpp_kernel(_written(folder, library))
            for name, launch in self.triton.items():
                kernels[name] = load_triton_kernel(launch, _written(folder, launch.cubin))
        call = names_defined_by(self.text, kernels)["call"]
        return _with_realigned(call, self.realigned) if self.realigned else call


def _written(folder: str, content: bytes) -> str:
    # Named by content: a loader takes files of one name for one library.
    path = Path(folder, hashlib.sha256(content).hexdigest())
    path.write_bytes(content)
    return str(path)


def names_defined_by(text: str, kernels: Mapping[str, Any]) -> dict[str, Any]:
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
