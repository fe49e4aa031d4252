"""Where the IR ops in the demo's bodies come from: this package's own, or the real vLLM's; or none are IR ops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..ops.quantization import FP8

OWN = "dispatch_compile"
VLLM = "vllm"
ATEN = "aten"  # no IR ops: ATen ops that give results of the same shapes, to see what the rest of a body costs

# What Gemma 3n takes for a sparsity of 95 %: the 0.95 quantile of the normal distribution.
_STD_MULTIPLIER = 1.6448536269514722


@dataclass(frozen=True)
class IrOps:
    """The ops that all sources have, in one form.

    Attributes:
        rms_norm: ``(x [T, ..., H], weight [H], epsilon) -> [T, ..., H]``.
        activation_and_mul: ``(x [T, 2 * D]) -> [T, D]``: the activation of one half times the other.
        quant_per_token: ``(x [T, H]) -> (q [T, H], scale [T, 1])``, with ``x`` about ``q * scale``.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    activation_and_mul: Callable[[Tensor], Tensor]
    quant_per_token: Callable[[Tensor], tuple[Tensor, Tensor]]


@functools.cache
def ir_ops(source: str) -> IrOps:
    """The ops of a source, :data:`OWN`, :data:`VLLM` or :data:`ATEN`.

    Raises:
        ImportError: vLLM is not installed, or is too old to have these ops.
    """
    return _SOURCES[source]()


def _own() -> IrOps:
    return IrOps(ops.rms_norm, ops.silu_and_mul, ops.quant_fp8_per_token)


def _vllm() -> IrOps:
    import vllm.ir

    if not hasattr(vllm.ir.ops, "gelu_and_mul_sparse"):
        raise ImportError("this vLLM has no vllm.ir.ops.gelu_and_mul_sparse")

    def activation_and_mul(x: Tensor) -> Tensor:
        activated: Tensor = vllm.ir.ops.gelu_and_mul_sparse(x, _STD_MULTIPLIER)
        return activated

    return IrOps(vllm.ir.ops.rms_norm, activation_and_mul, ops.quant_fp8_per_token)


def _aten() -> IrOps:
    def scaled(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return x * weight

    def product_of_halves(x: Tensor) -> Tensor:
        one, other = x.chunk(2, dim=-1)
        return one * other

    def not_scaled(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.to(FP8), x.new_ones(len(x), 1, dtype=torch.float32)

    return IrOps(scaled, product_of_halves, not_scaled)


_SOURCES = {OWN: _own, VLLM: _vllm, ATEN: _aten}


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
