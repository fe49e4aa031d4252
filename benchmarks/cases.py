"""What is measured: ops, and inputs for a number of tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dispatch_compile import IrOp, ops
from dispatch_compile.ops.quantization import GROUP

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

EPSILON = 1e-6
SCALE = 0.01  # 448 of them are 4.48 standard deviations of the inputs
LATENT, ROPE = 512, 64  # DeepSeek-V3's


@dataclass(frozen=True)
class Sizes:
    """The size and kind of a case's inputs."""

    tokens: int
    hidden: int
    dtype: torch.dtype
    device: str


class Inputs:
    """Makes random inputs of unit size, other ones each time."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._random = torch.Generator(sizes.device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random, device=self.sizes.device, dtype=self.sizes.dtype)

    def activation(self) -> Tensor:
        """``[T, hidden]``"""
        return self.normal(self.sizes.tokens, self.sizes.hidden)

    def weight(self) -> Tensor:
        """``[hidden]``"""
        return self.normal(self.sizes.hidden)

    def scale(self) -> Tensor:
        """One element, float32."""
        return torch.full((1,), SCALE, device=self.sizes.device)

    def query(self) -> tuple[Tensor, Tensor]:
        """Latent and rotary parts with as many heads as fill ``hidden`` with their latent parts."""
        tokens, heads = self.sizes.tokens, self.sizes.hidden // LATENT
        return self.normal(tokens, heads, LATENT), self.normal(tokens, heads, ROPE)


class RoughInputs(Inputs):
    """Makes inputs that no model should: rows in turn of all magnitudes whose squares the dtype holds; of numbers about
    its smallest, zeros of both signs among them; of unit size; and of unit size, infinities and NaN among them."""

    def normal(self, *shape: int) -> Tensor:
        unit, limits = super().normal(*shape), torch.finfo(self.sizes.dtype)
        uniform = torch.rand(shape, generator=self._random, device=self.sizes.device)
        lowest, highest = (0.5 * math.log2(limit) for limit in (limits.smallest_normal, limits.max))
        wide = unit.sign() * (lowest + (highest - lowest) * uniform).exp2()
        tiny = unit * uniform.round() * limits.smallest_normal
        special = unit.masked_fill(uniform < 2e-4, math.inf).masked_fill(uniform < 1e-4, math.nan)
        kinds = torch.stack([kind.to(unit.dtype).reshape(-1, shape[-1]) for kind in (wide, tiny, unit, special)])
        rows = torch.arange(kinds.shape[1], device=unit.device)
        return kinds[rows % len(kinds), rows].view(shape)


@dataclass(frozen=True)
class Case:
    """An op and its inputs.

    Attributes:
        op: the op.
        arguments: makes one call's arguments.
        parts: the two ops that it is composed of, if it is: the second takes the first result of the first.
        hidden_multiple: what the hidden size must be divisible by.
        reduces: whether it reduces rows, for which Inductor has more than one kind of kernel.
    """

    op: IrOp
    arguments: Callable[[Inputs], tuple[Any, ...]]
    hidden_multiple: int = 1
    reduces: bool = False
    parts: tuple[IrOp, ...] = ()

    @property
    def plain(self) -> Callable[..., Any]:
        """The op as a function of torch's own ops alone, for those to whom an IR op inside is opaque."""
        native = self.op.impls["native"].impl_fn
        if not self.parts:
            return native
        first, second = (part.impls["native"].impl_fn for part in self.parts)

        def both(*args: Any) -> Any:
            result = first(*args)
            if isinstance(result, Tensor):
                return second(result)
            return (*second(result[0]), *result[1:])

        # Dynamo compiles a code object for so many cases, and no more: each has one of its own.
        both.__code__ = both.__code__.replace(co_name=self.op.name)
        return functools.update_wrapper(both, native)  # the signature


def _composed(op: IrOp, *parts: IrOp) -> Case:
    """The case of an activation or a norm, and then a quantization."""
    first = _FIRST[parts[0].name]
    groups = GROUP if parts[1] is ops.quant_fp8_per_group else 1
    return Case(op, first.arguments, groups * first.hidden_multiple, reduces=True, parts=parts)


# The hidden size is that of the input, also where the output is half as wide.
_FIRST = {
    case.op.name: case
    for case in (
        Case(ops.rms_norm, lambda make: (make.activation(), make.weight(), EPSILON), reduces=True),
        Case(
            ops.fused_add_rms_norm,
            lambda make: (make.activation(), make.activation(), make.weight(), EPSILON),
            reduces=True,
        ),
        Case(ops.silu_and_mul, lambda make: (make.activation(),), hidden_multiple=2),
    )
}
CASES = _FIRST | {
    case.op.name: case
    for case in (
        Case(ops.gelu_and_mul, lambda make: (make.activation(),), hidden_multiple=2),
        Case(ops.quant_fp8_static, lambda make: (make.activation(), make.scale())),
        Case(ops.quant_fp8_per_token, lambda make: (make.activation(),), reduces=True),
        Case(ops.quant_fp8_per_group, lambda make: (make.activation(),), hidden_multiple=128, reduces=True),
        Case(ops.concat_quant_fp8, lambda make: (*make.query(), make.scale()), hidden_multiple=LATENT),
        _composed(ops.silu_and_mul_quant_fp8_per_token, ops.silu_and_mul, ops.quant_fp8_per_token),
        _composed(ops.silu_and_mul_quant_fp8_per_group, ops.silu_and_mul, ops.quant_fp8_per_group),
        _composed(ops.rms_norm_quant_fp8_per_token, ops.rms_norm, ops.quant_fp8_per_token),
        _composed(ops.rms_norm_quant_fp8_per_group, ops.rms_norm, ops.quant_fp8_per_group),
        _composed(ops.fused_add_rms_norm_quant_fp8_per_token, ops.fused_add_rms_norm, ops.quant_fp8_per_token),
        _composed(ops.fused_add_rms_norm_quant_fp8_per_group, ops.fused_add_rms_norm, ops.quant_fp8_per_group),
    )
}
DEFAULT_OPS = ("rms_norm", "fused_add_rms_norm", "silu_and_mul", "quant_fp8_per_token")


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a call's arguments or result."""
    if isinstance(value, Tensor):
        return [value]
    return [item for item in value if isinstance(item, Tensor)] if isinstance(value, (tuple, list)) else []


def bytes_moved(arguments: tuple[Any, ...], result: Any) -> int:
    """What a call must move at least: each input read once, each output written once."""
    return sum(tensor.nbytes for tensor in (*tensors(arguments), *tensors(result)))
