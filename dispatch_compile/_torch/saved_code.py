"""Private names of torch for taking Inductor's code apart, and for running the parts in another process.

Only taking apart may import Inductor. Running must not: importing it takes longer than all the rest of a first call
with saved code.
"""

from __future__ import annotations

import inspect
import marshal
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch

__all__ = [
    "TritonLaunch",
    "cpp_kernel_library",
    "generated_module",
    "inductor_overrides",
    "load_cpp_kernel",
    "load_triton_kernel",
    "triton_launch",
]


def inductor_overrides() -> dict[str, Any]:
    """Inductor's settings that this process changed, apart from those that environment variables change. Inductor's
    own ways to ask import it, and mix the two."""
    config = sys.modules.get("torch._inductor.config")
    if config is None:
        return {}
    from torch.utils._config_module import _UNSET_SENTINEL as UNSET

    changed = {}
    for name, entry in config._config.items():
        value = entry.user_override
        value = value.get() if isinstance(value, ContextVar) else value  # a ContextVar from torch 2.13 on
        default = entry.default if entry.env_value_default is UNSET else entry.env_value_default
        if value is not UNSET and value != default:
            changed[name] = value
    return changed


def generated_module(run: Callable[..., Any]) -> tuple[Mapping[str, Any], tuple[int, ...]] | None:
    """The namespace of the module that Inductor generated, and the positions of inputs that must be aligned, of the
    callable that it made of them; None if it has made something else, as with CUDA graphs."""
    positions: Sequence[int] = ()
    if getattr(run, "__qualname__", None) == "align_inputs_from_check_idxs.<locals>.run":
        wrapped = inspect.getclosurevars(run).nonlocals
        run, positions = wrapped["model"], wrapped["inputs_to_check"]
    namespace = getattr(getattr(run, "__func__", run), "__globals__", {})
    return (namespace, tuple(positions)) if namespace.get("call") == run else None


def cpp_kernel_library(kernel: Any) -> bytes | None:
    """The library of a C++ kernel that Inductor compiled as a Python extension module."""
    path = getattr(getattr(kernel, "__self__", None), "__file__", None)
    return Path(path).read_bytes() if path is not None and Path(path).exists() else None


def load_cpp_kernel(path: str) -> Callable[..., None]:
    """Load such a library as Inductor does: by the variable it finds torch's function that reads a tensor's address."""
    # torch's stub leaves it out.
    address = torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr  # type: ignore[attr-defined]
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(address)
    loader = ExtensionFileLoader(f"{Path(path).name}.kernel", path)
    module = module_from_spec(spec_from_loader(loader.name, loader))  # type: ignore[arg-type]  # never None here
    loader.exec_module(module)
    kernel: Callable[..., None] = module.kernel
    return kernel


class TritonLaunch(NamedTuple):
    """A Triton kernel as torch's static launcher, which is part of torch itself, runs it.

    Attributes:
        cubin: the machine code.
        name: of the function in it.
        device: index of the CUDA device.
        shared_bytes: of shared memory for a block.
        warps: for a block.
        parameter_types: a letter for each parameter, as the launcher spells them.
        scratch: how many pointers to scratch memory, which it has none of, Triton adds to the parameters.
        grid: marshalled code object of ``launcher(*arguments, stream)``, which computes the grid and calls ``runner``.
    """

    cubin: bytes
    name: str
    device: int
    shared_bytes: int
    warps: int
    parameter_types: str
    scratch: int
    grid: bytes


def triton_launch(kernel: Any) -> TritonLaunch | None:
    """What is left of a kernel that Inductor has tuned; None if the static launcher does not run it, or if it is still
    to be tuned, or its machine code is no longer in Triton's cache."""
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
    from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedCudaKernel

    launchers = getattr(kernel, "launchers", [])
    if len(launchers) != 1 or torch.version.hip is not None:
        return None
    launcher = launchers[0]
    code = launcher.__code__
    static = getattr(launcher.__globals__.get("runner"), "__self__", None)
    device = kernel.triton_meta.get("device")
    calls_more = set(code.co_names) - {"runner", "max", "min"}
    # The last two came with torch 2.15: tensor descriptors among the parameters, and scratch memory that is used.
    unsupported = getattr(static, "_has_tensordesc", False) or getattr(static, "global_scratch_size", 0)
    if not isinstance(static, StaticallyLaunchedCudaKernel) or device is None or calls_more or unsupported:
        return None
    cubin = Path(triton_cache_dir(device), launcher.cache_hash, f"{static.name}.cubin")
    if not cubin.exists():
        return None
    return TritonLaunch(
        cubin=cubin.read_bytes(),
        name=static.name,
        device=device,
        shared_bytes=static.shared,
        warps=static.num_warps,
        parameter_types=static.arg_tys,
        scratch=static.has_global_scratch + static.has_profile_scratch,
        grid=marshal.dumps(code),
    )


def load_triton_kernel(kernel: TritonLaunch, cubin_path: str) -> Any:
    """An object whose ``run(*arguments, stream=...)`` launches the kernel, as generated code calls it."""
    launch = torch._C._StaticCudaLauncher._launch_kernel
    with torch.cuda.device(kernel.device):
        loaded = torch._C._StaticCudaLauncher._load_kernel(cubin_path, kernel.name, kernel.shared_bytes, kernel.device)
    function = loaded[-3]  # before the numbers of registers and spills; from torch 2.13 on, the module comes first
    warps, shared_bytes = kernel.warps, kernel.shared_bytes
    types = kernel.parameter_types + "O" * kernel.scratch
    scratch = (None,) * kernel.scratch

    def runner(grid_0: int, grid_1: int, grid_2: int, stream: int, *arguments: Any) -> None:
        launch(function, grid_0, grid_1, grid_2, warps, shared_bytes, types, (*arguments, *scratch), stream)

    return SimpleNamespace(run=FunctionType(marshal.loads(kernel.grid), {"runner": runner}))
