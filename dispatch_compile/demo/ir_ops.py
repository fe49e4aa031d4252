"""Where the IR ops in the demo's bodies come from: this package's own, or the real vLLM's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor

from dispatch_compile import ops

OWN = "dispatch_compile"
VLLM = "vllm"

# What Gemma 3n takes for a sparsity of 95 %: the 0.95 quantile of the normal distribution.
_STD_MULTIPLIER = 1.6448536269514722


@dataclass(frozen=True)
class IrOps:
    """The IR ops that both sources have, in one form.

    Attributes:
        rms_norm: ``(x [T, ..., H], weight [H], epsilon) -> [T, ..., H]``.
        activation_and_mul: ``(x [T, 2 * D]) -> [T, D]``: the activation of one half times the other.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    activation_and_mul: Callable[[Tensor], Tensor]


@functools.cache
def ir_ops(source: str) -> IrOps:
    """The IR ops of a source, :data:`OWN` or :data:`VLLM`.

    Raises:
        ImportError: vLLM is not installed, or is too old to have these ops.
    """
    return _vllm() if source == VLLM else IrOps(ops.rms_norm, ops.silu_and_mul)


def _vllm() -> IrOps:
    import vllm.ir

    if not hasattr(vllm.ir.ops, "gelu_and_mul_sparse"):
        raise ImportError("this vLLM has no vllm.ir.ops.gelu_and_mul_sparse")

    def activation_and_mul(x: Tensor) -> Tensor:
        activated: Tensor = vllm.ir.ops.gelu_and_mul_sparse(x, _STD_MULTIPLIER)
        return activated

    return IrOps(vllm.ir.ops.rms_norm, activation_and_mul)


@contextmanager
def callable_through_torch(source: str) -> Iterator[None]:
    """Calls of the source's IR ops reach torch's dispatcher in here, and take native implementations."""
    with ExitStack() as contexts:
        if source == VLLM:
            import vllm.ir

            contexts.enter_context(vllm.ir.enable_torch_wrap())  # off, a call goes past torch and every mode
            for op in vllm.ir.op.IrOp.registry.values():
                contexts.enter_context(op.set_priority(["native"]))  # unset means the same, with a warning
        yield
