"""vLLM's IR ops, found when vLLM is imported."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

from .._ir.protocol import TorchOp
from ._required import missing, required

_PURPOSE = "run vLLM's IR ops compiled"


def ir_ops() -> list[TorchOp]:
    """The ops in ``vllm.ir``'s registry; none while vLLM is not imported.

    Raises:
        RuntimeError: this vLLM's ops lack an attribute that the package reads.
    """
    ops = registered_ir_ops()
    try:
        for op in ops:
            _read(op)
    except AttributeError as error:
        raise missing(error.obj, str(error.name), _PURPOSE) from None
    return ops


def registered_ir_ops() -> list[TorchOp]:
    """The same ops, without a look at them: quick enough for whenever a mode is entered."""
    module = sys.modules.get("vllm.ir.op")
    if module is None or getattr(module.__spec__, "_initializing", False):
        return []
    return list(required(required(module, "IrOp", _PURPOSE), "registry", _PURPOSE).values())


def ir_ops_called_through_torch() -> AbstractContextManager[object]:
    """A context in which vLLM's IR ops are called as torch ops, also where its ``enable_torch_wrap(False)`` lets them
    be called past torch. The setting is the process's: other threads' calls go that way, too, to the same kernels."""
    module = sys.modules.get("vllm.ir.op")
    if module is None or getattr(module, "_ENABLE_TORCH_WRAP", True):
        return nullcontext()
    context: AbstractContextManager[object] = required(module, "enable_torch_wrap", _PURPOSE)(True)
    return context


def _read(op: TorchOp) -> None:
    """Read what the rest of the package reads of an op."""
    _ = op.torch_op, op.activations, op.dispatch
    inplace = getattr(op, "maybe_inplace", None)
    if inplace is not None:
        _ = inplace.torch_op
    for impl in getattr(op, "impls", {}).values():
        _ = impl.provider, impl.func_impl_fn
