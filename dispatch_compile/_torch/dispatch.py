"""Private names of torch's dispatcher: ops, kernels, modes, and the state of a thread by which a call finds its way."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from functools import lru_cache
from types import TracebackType
from typing import Any

import torch
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    FunctionSchema,
    _dispatch_find_schema_or_throw,
    _dispatch_get_all_op_names,
    _dispatch_has_kernel_for_dispatch_key,
    _dispatch_keyset_full_after,
    _dispatch_tls_is_dispatch_key_excluded,
    _ExcludeDispatchKeyGuard,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    parse_schema,
)

# See hide_from_dynamo.
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

# torch.compile's own C++ guards: one call checks what would take Python twenty.
from torch._C._dynamo.guards import GlobalStateGuard, TensorGuards

# The class behind torch.library.custom_op, to tell a decorated op from a function.
from torch._library.custom_ops import CustomOpDef

# OpOverload and OpOverloadPacket have no public name; torch.ops hands them out.
from torch._ops import OpOverload, OpOverloadPacket

# Its _is_profiler_enabled is the cheapest answer to whether a profiler is on, which every intercepted call asks.
from torch.autograd import profiler

# TorchDispatchMode's documented home is this private module, and that of the stack that it is on as well.
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

__all__ = [
    "BELOW_BACKEND_SELECT",
    "CustomOpDef",
    "FunctionSchema",
    "GlobalStateGuard",
    "OpOverload",
    "OpOverloadPacket",
    "QuietMode",
    "TensorGuards",
    "TorchDispatchMode",
    "all_op_names",
    "decomposes",
    "disabled_torch_function",
    "dispatch_modes_active",
    "dual_level",
    "function_modes_active",
    "global_state",
    "has_kernel",
    "has_schema",
    "hide_from_dynamo",
    "in_functorch_transform",
    "inexact_matmul_precision",
    "is_dynamo_compiling",
    "is_functorch_wrapped",
    "is_jit_tracing",
    "is_zero_tensor",
    "overload_named",
    "parse_schema",
    "pop_mode",
    "profiler",
    "push_mode",
    "reinterpret_tensor",
    "torchs_modes",
    "uncompiled",
    "without_modes",
    "without_version_counting",
    "wrap_custom_op_kernels",
]

# The keys that a kernel at BackendSelect hands a call on to: the backend's own.
BELOW_BACKEND_SELECT = _dispatch_keyset_full_after(DispatchKey.BackendSelect)

# "ns::name.overload" of every op registered; torch.ops lists only what Python has touched.
all_op_names: Callable[[], list[str]] = _dispatch_get_all_op_names

# reinterpret_tensor(tensor, size, stride), both plain tuples: as Inductor's code does it, which is no view for autograd
# to know of. torch's stub leaves it out.
reinterpret_tensor: Callable[..., torch.Tensor] = torch._C._dynamo.guards._reinterpret_tensor  # type: ignore[attr-defined]

# What a subclass has for __torch_function__ that leaves torch's functions as they are.
disabled_torch_function: Callable[..., Any] = torch._C._disabled_torch_function_impl

# Non-zero while a TorchDispatchMode would see the ops in a native implementation's body.
dispatch_modes_active: Callable[[], int] = _len_torch_dispatch_stack

# Non-zero while a TorchFunctionMode would see the torch functions that a function calls.
function_modes_active: Callable[[], int] = _len_torch_function_stack

# Constant False, for which Dynamo, when it traces a function that asks, puts True.
is_dynamo_compiling: Callable[[], bool] = torch.compiler.is_dynamo_compiling

# Whether torch.jit.trace is at work; public, but not in the __all__ of torch.jit.
is_jit_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]

# The modes that torch would hand an op to now, innermost last.
torchs_modes: Callable[[], list[TorchDispatchMode]] = _get_current_dispatch_mode_stack


# Put a mode on torch's stack, as what is on top.
push_mode: Callable[[TorchDispatchMode], None] = _push_mode


def pop_mode(mode: TorchDispatchMode) -> None:
    """Take off torch's stack what is on top; ``mode`` must be that."""
    _pop_mode(getattr(mode, "_mode_key", None))


class QuietMode(TorchDispatchMode):
    """A mode that leaves Dynamo as it is: while a mode is on the stack that does not say these two, Dynamo skips what
    it meets, on every thread, and runs it eagerly.

    It leaves torch's flags about modes alone, too. They belong to the process and are put back as if all threads shared
    one stack, so of two modes whose times overlap, the one left last brings back the other's flags, for ever.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without annotations

    def __enter__(self) -> QuietMode:
        push_mode(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pop_mode(self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


# A context in which no TorchDispatchMode sees anything; leaving a mode and entering it again would run its own code.
without_modes: Callable[[], AbstractContextManager[object]] = _disable_current_modes


def overload_named(packet: OpOverloadPacket, name: str) -> OpOverload:
    """One of the overloads that ``packet.overloads()`` lists, which are attributes."""
    overload: OpOverload = getattr(packet, name)
    return overload


def has_schema(qualified: str) -> bool:
    """Whether ``"ns::name.overload"`` is defined. A name with kernels alone, as our hooks leave when the library that
    defined an op is gone, is listed too, and ``torch.ops`` still hands out what it handed out before."""
    name, _, overload_name = qualified.partition(".")
    try:
        _dispatch_find_schema_or_throw(name, overload_name)
    except RuntimeError:
        return False
    return True


def has_kernel(overload: OpOverload, dispatch_key: str) -> bool:
    """Whether the op has a kernel of its own at ``dispatch_key``."""
    return bool(_dispatch_has_kernel_for_dispatch_key(overload.name(), dispatch_key))


def decomposes(overload: OpOverload) -> bool:
    """Whether torch runs the op on this thread as the ops that it is made of, for autograd: it has no kernel then."""
    above_backends = not _dispatch_tls_is_dispatch_key_excluded(DispatchKey.AutogradFunctionality)
    return above_backends and has_kernel(overload, "CompositeImplicitAutograd")


def without_version_counting() -> AbstractContextManager[object]:
    """Keep torch from noting, on this thread, that an op changes its arguments; it does so before the op runs."""
    guard: AbstractContextManager[object] = _ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.ADInplaceOrView))
    return guard


def global_state() -> tuple[tuple[str, Hashable], ...]:
    """The global state that changes what is captured, by name: torch.compile's snapshot, and what is not in it."""
    snapshot = GlobalStateGuard().__getstate__()  # type: ignore[attr-defined]  # missing in torch's stub
    return (*_read_snapshot(snapshot), ("inexact_matmul_precision", inexact_matmul_precision()))


@lru_cache(maxsize=64)
def _read_snapshot(snapshot: str) -> tuple[tuple[str, Hashable], ...]:
    state = json.loads(snapshot)
    return tuple((name, str(value) if isinstance(value, dict) else value) for name, value in state.items())


def inexact_matmul_precision() -> str | None:
    """What a CPU may round float32 matrices to before it multiplies them: ``tf32`` if the precision is ``high``,
    ``bf16`` if it is ``medium``; None if nothing. The public ``get_float32_matmul_precision`` raises if somebody set
    ``fp32_precision``, and reading that takes microseconds."""
    precision: str = torch._C._get_fp32_precision_getter("mkldnn", "matmul")
    return None if precision in ("none", "ieee") else precision


def hide_from_dynamo(fn: Callable[..., Any]) -> None:
    """Make Dynamo run ``fn``, and all that it calls, as plain Python: it would trace the kernels of ops that are
    called in frames that it skipped. ``torch.compiler.disable`` does so by wrapping, which costs every call."""
    set_code_exec_strategy(fn.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


def dual_level() -> int:
    """The current forward-mode AD level, -1 outside; tensors do not show that they are dual."""
    return int(torch.autograd.forward_ad._current_level)


def in_functorch_transform() -> bool:
    """Whether a functorch transform (vmap, grad, functionalize) is running on this thread."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_functorch_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a functorch transform (vmap, grad, functionalize) wraps ``tensor``; its type does not tell."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_zero_tensor(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is autograd's storage-less zero; no public test exists."""
    return bool(tensor._is_zerotensor())


def wrap_custom_op_kernels(op: CustomOpDef, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace each kernel of a ``torch.library.custom_op`` by ``wrap(kernel)``; the public API cannot read them."""
    for device_type, kernel in list(op._backend_fns.items()):
        op.register_kernel(device_type, wrap(kernel))


def uncompiled(fn: Any) -> Any:
    """The function that ``torch.compile`` was given, where ``fn`` is what it made of it; else ``fn`` itself.

    What ``functools.wraps`` makes around the result, and a method bound to it, have its attributes but are not it: the
    id tells. A compiled module is a module still.
    """
    made = getattr(fn, "_torchdynamo_wrapper_id", None) == id(fn) and not isinstance(fn, torch.nn.Module)
    return fn._torchdynamo_orig_callable if made else fn
