"""Calls of every overload that ships in ``dispatch_compile.ops``: bare, and from the bodies of opaque ops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dispatch_compile import ops

NAMESPACE = "dispatch_compile_shipped"
_serial = itertools.count()


@dataclass(frozen=True)
class Shipped:
    """An overload, and arguments for it in a floating point dtype; the first argument is an activation."""

    op: Callable[..., Any]
    make_args: Callable[[torch.dtype], tuple[Any, ...]]

    @property
    def schema(self) -> str:
        """The overload's schema without its name."""
        text = str(self.op.torch_op._schema)
        return text[text.index("(") :]


def random(dtype: torch.dtype, *size: int) -> Tensor:
    """The same normal numbers in every process, other ones for every size."""
    return torch.randn(size, generator=torch.Generator().manual_seed(math.prod(size))).to(dtype)


SCALE = torch.tensor([0.05])

SHIPPED = {
    "rms_norm": Shipped(ops.rms_norm, lambda dtype: (random(dtype, 4, 16), random(dtype, 16), 1e-6)),
    "fused_add_rms_norm": Shipped(
        ops.fused_add_rms_norm, lambda dtype: (random(dtype, 4, 16), random(dtype, 4, 16) * 2, random(dtype, 16), 1e-6)
    ),
    "fused_add_rms_norm.maybe_inplace": Shipped(
        ops.fused_add_rms_norm.maybe_inplace,
        lambda dtype: (random(dtype, 4, 16), random(dtype, 4, 16) * 2, random(dtype, 16), 1e-6),
    ),
    "silu_and_mul": Shipped(ops.silu_and_mul, lambda dtype: (random(dtype, 4, 16),)),
    "gelu_and_mul": Shipped(ops.gelu_and_mul, lambda dtype: (random(dtype, 4, 16), "tanh")),
    "quant_fp8_static": Shipped(ops.quant_fp8_static, lambda dtype: (random(dtype, 4, 16), SCALE.clone())),
    "quant_fp8_per_token": Shipped(ops.quant_fp8_per_token, lambda dtype: (random(dtype, 4, 16),)),
    "quant_fp8_per_group": Shipped(ops.quant_fp8_per_group, lambda dtype: (random(dtype, 3, 128),)),
    "concat_quant_fp8": Shipped(
        ops.concat_quant_fp8, lambda dtype: (random(dtype, 4, 2, 8), random(dtype, 4, 2, 4), SCALE.clone())
    ),
    "silu_and_mul_quant_fp8_per_token": Shipped(
        ops.silu_and_mul_quant_fp8_per_token, lambda dtype: (random(dtype, 4, 16),)
    ),
    "silu_and_mul_quant_fp8_per_group": Shipped(
        ops.silu_and_mul_quant_fp8_per_group, lambda dtype: (random(dtype, 3, 256),)
    ),
    "rms_norm_quant_fp8_per_token": Shipped(
        ops.rms_norm_quant_fp8_per_token, lambda dtype: (random(dtype, 4, 16), random(dtype, 16), 1e-6)
    ),
    "rms_norm_quant_fp8_per_group": Shipped(
        ops.rms_norm_quant_fp8_per_group, lambda dtype: (random(dtype, 3, 128), random(dtype, 128), 1e-6)
    ),
    "fused_add_rms_norm_quant_fp8_per_token": Shipped(
        ops.fused_add_rms_norm_quant_fp8_per_token,
        lambda dtype: (random(dtype, 4, 16), random(dtype, 4, 16) * 2, random(dtype, 16), 1e-6),
    ),
    "fused_add_rms_norm_quant_fp8_per_group": Shipped(
        ops.fused_add_rms_norm_quant_fp8_per_group,
        lambda dtype: (random(dtype, 3, 128), random(dtype, 3, 128) * 2, random(dtype, 128), 1e-6),
    ),
}

BARE, IN_LIBRARY_OP, IN_CUSTOM_OP = "bare", "in a library op", "in a custom_op"
PLACES = [BARE, IN_LIBRARY_OP, IN_CUSTOM_OP]


class OpaqueOps:
    """Opaque ops around the shipped ones, defined as they are asked for and gone after :meth:`destroy`.

    A library op is what ``torch.library.Library`` makes: autograd looks into its body. A ``torch.library.custom_op``
    keeps autograd out.
    """

    def __init__(self) -> None:
        self._library = torch.library.Library(NAMESPACE, "FRAGMENT")
        self._custom: list[Any] = []
        self._calls: dict[tuple[str, str], Callable[..., Any]] = {}

    def call(self, name: str, place: str) -> Callable[..., Any]:
        """The shipped op ``name`` as it is called in ``place``: a function of the op's arguments."""
        if place == BARE:
            return SHIPPED[name].op.torch_op
        if (name, place) not in self._calls:
            define = self._library_op if place == IN_LIBRARY_OP else self._custom_op
            self._calls[name, place] = define(f"{name.replace('.', '_')}_{next(_serial)}", SHIPPED[name])
        return self._calls[name, place]

    def _library_op(self, name: str, shipped: Shipped) -> Callable[..., Any]:
        self._library.define(name + shipped.schema)
        self._library.impl(name, _body(shipped), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _body(shipped), lib=self._library)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    def _custom_op(self, name: str, shipped: Shipped) -> Callable[..., Any]:
        arguments = shipped.op.torch_op._schema.arguments
        mutated = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        op = torch.library.custom_op(
            f"{NAMESPACE}::{name}", _body(shipped), mutates_args=mutated, schema=shipped.schema
        )
        op.register_fake(_body(shipped))
        self._custom.append(op)
        return op

    def destroy(self) -> None:
        """Take the ops out of torch."""
        self._library._destroy()
        for op in self._custom:
            op._lib._destroy()


def _body(shipped: Shipped) -> Callable[..., Any]:
    def body(*args: Any) -> Any:
        return shipped.op(*args)

    return body


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among arguments or results."""
    return [value for value in (values if isinstance(values, (tuple, list)) else [values]) if isinstance(value, Tensor)]


def with_tensors(args: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """``args`` with other tensors in the places of its tensors."""
    replacements = iter(tensors)
    return [next(replacements) if isinstance(arg, Tensor) else arg for arg in args]
