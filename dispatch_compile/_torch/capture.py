"""Private names of torch for capturing a call as a graph: fake tensors, symbolic shapes, make_fx.

They are how torch itself captures; only torch.export wraps them publicly, and it captures programs, not calls.
Importing them takes seconds, so each function does it when called.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch._C import (
    DispatchKey,
)

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv as ShapeEnv

__all__ = [
    "at_least",
    "dtype_abbreviation",
    "dynamic_number",
    "dynamic_size",
    "forget_shape_envs",
    "guard_functions",
    "new_fake_mode",
    "new_shape_env",
    "shape_guard_names",
    "size_at",
    "size_depends_on_values",
    "size_text",
    "sym_sqrt",
    "trace",
    "without_early_decompositions",
]


# What math.sqrt makes of a symbolic number, in a graph.
sym_sqrt: Callable[[Any], Any] = torch._sym_sqrt  # type: ignore[attr-defined]  # torch makes it when imported


def new_shape_env() -> ShapeEnv:
    """A ShapeEnv: the symbols of one capture and what is assumed of them."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return ShapeEnv()


def forget_shape_envs() -> None:
    """Free the ShapeEnvs of captures that are over: torch keeps each, 40 KB, as a key of caches without a bound, and
    empties these only when one comes along that knows more or less than the last."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()


def new_fake_mode(shape_env: ShapeEnv | None) -> FakeTensorMode:
    """A FakeTensorMode, with symbols or without, that refuses real tensors: an implementation reads its arguments.

    It leaves nothing in the cache of results that all of them share, which has no bound, and where symbols keep their
    ShapeEnv alive.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(shape_env=shape_env)
    mode.cache_enabled = False
    return mode


def dynamic_size(shape_env: ShapeEnv, size: int, tensor_name: str) -> torch.SymInt:
    """A fresh symbol for dimension 0 of the tensor that guards will call ``L[tensor_name]``."""
    from torch._dynamo.source import LocalSource, TensorProperty, TensorPropertySource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = TensorPropertySource(LocalSource(tensor_name), TensorProperty.SIZE, 0)
    symbol = shape_env.create_symbol(size, source, dynamic_dim=DimDynamic.DYNAMIC)
    return cast(torch.SymInt, shape_env.create_symintnode(symbol, hint=size, source=source))  # no int: it is dynamic


def dynamic_number(shape_env: ShapeEnv, value: float, name: str) -> torch.SymInt | torch.SymFloat:
    """A fresh symbol for an integer or floating-point number that guards will call ``L[name]``."""
    from torch._dynamo.source import LocalSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = LocalSource(name)
    symbol = shape_env.create_unspecified_symbol(value, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    make = shape_env.create_symintnode if isinstance(value, int) else shape_env.create_symfloatnode
    return cast("torch.SymInt | torch.SymFloat", make(symbol, hint=value, source=source))


def trace(
    fn: Callable[..., Any], inputs: Sequence[Any], decompositions: Mapping[Any, Callable[..., Any]] | None = None
) -> torch.fx.GraphModule:
    """The ATen graph of ``fn`` on symbols and fake tensors; ``decompositions`` says of what some ops are made."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with without_early_decompositions():
        return make_fx(fn, tracing_mode="symbolic", decomposition_table=dict(decompositions or {}))(*inputs)


# Ops of which ATen has a kernel although torch registers a decomposition in Python for them.
_DECOMPOSED_EARLY = ("upsample", "hardshrink", "softshrink", "multi_margin_loss", "multilabel_margin_loss_forward")


@contextmanager
def without_early_decompositions() -> Iterator[None]:
    """Let tracing see ops that ATen has kernels for. torch registers decompositions in Python for some, interpolation
    above all, which it applies before any table of decompositions, and which have other results."""
    import torch._decomp.decompositions  # registers them

    keys = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)
    names = [name for name in dir(torch.ops.aten) if any(part in name for part in _DECOMPOSED_EARLY)]
    packets = [getattr(torch.ops.aten, name) for name in names if "backward" not in name]
    ops = [getattr(packet, overload) for packet in packets for overload in packet.overloads()]
    removed = [(op, {key: op.py_kernels.pop(key) for key in keys if key in op.py_kernels}) for op in ops]
    try:
        for op in ops:
            op._dispatch_cache.clear()
        yield
    finally:
        for op, kernels in removed:
            op.py_kernels.update(kernels)
            op._dispatch_cache.clear()


def size_depends_on_values(value: object) -> bool:
    """Whether a traced value has a size that only the values in a tensor tell, as ``x[x > 0]`` has."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(value))


def at_least(size: int | torch.SymInt, least: int | torch.SymInt) -> bool:
    """Whether a size or stride is known to be so large at every number of tokens; to compare it would add a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(size >= least))


def size_at(size: int | torch.SymInt, values: Mapping[str, int]) -> int:
    """What a size or stride is for these values of the symbols, by name."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({symbol: values[symbol.name] for symbol in expression.free_symbols}))


def size_text(size: int | torch.SymInt, symbols: Mapping[str, str]) -> str:
    """Python source for a size or stride; ``symbols`` has expressions by the symbols' names."""
    if isinstance(size, int):
        return str(size)
    from torch.utils._sympy.printers import PythonPrinter

    text = PythonPrinter().doprint(size.node.expr)
    return re.sub(r"[A-Za-z_]\w*", lambda match: symbols.get(match[0], match[0]), text)


def shape_guard_names() -> dict[str, Any]:
    """The names that text from ``ShapeEnv.produce_guards_expression`` refers to."""
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

    return dict(SYMPY_INTERP)


def dtype_abbreviation(dtype: torch.dtype) -> str:
    """The short name that torch's own traces use: ``bf16``, ``f8e4m3fn``."""
    from torch.utils._dtype_abbrs import dtype_abbrs

    return str(dtype_abbrs.get(dtype, str(dtype).removeprefix("torch.")))


def guard_functions(guard: str | None) -> dict[str, Any]:
    """What :func:`shape_guard_names` gives, but nothing, and without importing SymPy, for a guard that needs none of
    it: most only compare the sizes of arguments."""
    names = {node.id for node in ast.walk(ast.parse(guard or "True", mode="eval")) if isinstance(node, ast.Name)}
    return {} if all(re.fullmatch(r"a\d+(_\d+)*", name) for name in names) else shape_guard_names()
