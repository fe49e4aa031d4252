"""When a call must run as if there were no mode, by its arguments and the thread's state."""

from __future__ import annotations

import torch

from .._torch.dispatch import (
    disabled_torch_function,
    dispatch_modes_active,
    dual_level,
    function_modes_active,
    in_functorch_transform,
    is_functorch_wrapped,
    is_jit_tracing,
    is_zero_tensor,
)
from .arguments import ABSENT, CONSTANTS, Arguments


def why_aside(arguments: Arguments) -> str | None:
    """Why a call with these arguments, now, on this thread, must run as if there were no mode; None if it may not.

    Compiled code is only ever made for plain strided tensors outside autograd; the rest is the caller's business.
    """
    if dispatch_modes_active():
        return "another dispatch mode watches the op's body"
    if dual_level() >= 0:
        return "forward-mode AD is active"
    grad = torch.is_grad_enabled()
    tensors: dict[int, str] = {}
    for leaf in arguments.leaves:
        value = leaf.value
        if not isinstance(value, torch.Tensor):
            if value is not ABSENT and not isinstance(value, CONSTANTS):
                return f"{leaf.name} is a {type(value).__name__}"
            continue
        reason = why_own_kind(value) or why_special(value)
        if reason is None and grad and value.requires_grad:
            reason = "requires grad and grad mode is on"
        first = tensors.setdefault(id(value), leaf.name)
        if reason is None and first != leaf.name:
            reason = f"is the same tensor as {first}"
        if reason is not None:
            return f"{leaf.name} {reason}"
        if torch.is_autocast_enabled(value.device.type):
            return f"autocast is on for {value.device.type}"
    return None


def why_function_aside(arguments: Arguments) -> str | None:
    """The same for a call of a function, which may have come from above of what an op is called through."""
    if function_modes_active():
        return "a TorchFunctionMode watches the function's body"
    if in_functorch_transform():
        return "a function transform is active"
    if is_jit_tracing():
        return "torch.jit.trace is tracing"
    if not any(leaf.is_tensor for leaf in arguments.leaves):
        return "it takes no tensor"
    return None


def why_own_kind(tensor: torch.Tensor) -> str | None:
    """Why the tensor's class, and not torch, decides what an op does with it; None if torch decides."""
    kind = type(tensor)
    overridden = kind.__torch_function__ is not disabled_torch_function
    if kind is not torch.Tensor and (overridden or kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__):
        return f"is a {kind.__name__}"
    return None


def why_special(tensor: torch.Tensor) -> str | None:
    """Why there is more to a tensor than strides over a storage of values; None if there is not."""
    if tensor.is_meta:
        return "is on the meta device"
    if tensor.layout is not torch.strided:
        return f"is {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_nested:
        return "is nested"
    if tensor.is_quantized:
        return "is quantized"
    if tensor.is_conj() or tensor.is_neg():
        return "is a lazy conjugate or negative"
    if is_functorch_wrapped(tensor):
        return "is wrapped by a functorch transform"
    if is_zero_tensor(tensor):
        return "is a zero tensor without storage"
    return None
