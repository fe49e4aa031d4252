"""What of a call's arguments is baked into compiled code, what stays dynamic, and which guards tell.

- Baked in: dtypes, devices, ranks, every size and stride but those below, scalars, strings, ``None``, lists'
  lengths, and torch's global state.
- Dynamic: dimension 0 of each activation (the token dimension) from two tokens up, and the strides that are
  multiples of it. No tokens and one token specialize, as everywhere in torch.

:func:`why_aside` names what the package does not compile for. :func:`key_of` identifies the specialization that
a call needs. :func:`guarded` makes the check, as generated code, that lets a later call skip both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ._torch_private import (
    GlobalStateGuard,
    OpOverload,
    TensorGuards,
    dispatch_modes_active,
    dual_level,
    global_state,
    inexact_matmul_precision,
    is_functorch_wrapped,
    is_zero_tensor,
)

_SCALARS = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Parameters:
    """The parameters of an op, as a call's arguments are read: names by position, and the activations."""

    names: tuple[str, ...]
    activations: frozenset[str]

    @staticmethod
    def of(overload: OpOverload, activations: Sequence[str]) -> Parameters:
        return Parameters(tuple(a.name for a in overload._schema.arguments), frozenset(activations))


@dataclass(frozen=True)
class Leaf:
    """One argument, or one item of a list argument."""

    name: str  # as a person writes it: x, weights[1]
    source: str  # as generated code reads it: a0 for the first argument, a1[2], k0 for the first keyword argument
    value: Any
    activation: bool
    dynamic: bool  # whether dimension 0 is the token dimension and there are at least two tokens


@dataclass(frozen=True)
class Arguments:
    """A call's arguments, flattened."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    leaves: tuple[Leaf, ...]
    lists: tuple[tuple[str, int], ...]  # source and length of each list argument

    @property
    def tensors(self) -> list[Leaf]:
        return [leaf for leaf in self.leaves if isinstance(leaf.value, torch.Tensor)]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """``args`` and ``kwargs`` with other tensors in the places of the tensor leaves."""
        values = {leaf.source: leaf.value for leaf in self.leaves}
        values.update(zip((leaf.source for leaf in self.tensors), tensors, strict=True))

        def rebuilt(source: str, value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [values[f"{source}[{i}]"] for i in range(len(value))]
            return values[source]

        args = [rebuilt(f"a{i}", value) for i, value in enumerate(self.args)]
        return args, {name: rebuilt(f"k{i}", value) for i, (name, value) in enumerate(self.kwargs.items())}


def flatten(parameters: Parameters, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """Read the arguments of a call as the dispatcher gives them (fact: by position, trailing defaults dropped)."""
    leaves: list[Leaf] = []
    lists: list[tuple[str, int]] = []
    named = [(parameters.names[i], f"a{i}", value) for i, value in enumerate(args)]
    named += [(name, f"k{i}", value) for i, (name, value) in enumerate(kwargs.items())]
    for name, source, value in named:
        activation = name in parameters.activations
        if isinstance(value, (list, tuple)):
            lists.append((source, len(value)))
            for i, item in enumerate(value):
                leaves.append(_leaf(f"{name}[{i}]", f"{source}[{i}]", item, activation))
        else:
            leaves.append(_leaf(name, source, value, activation))
    return Arguments(args, kwargs, tuple(leaves), tuple(lists))


def _leaf(name: str, source: str, value: Any, activation: bool) -> Leaf:
    dynamic = activation and isinstance(value, torch.Tensor) and value.dim() > 0 and value.size(0) >= 2
    return Leaf(name, source, value, activation, dynamic)


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
            if value is not None and not isinstance(value, _SCALARS):
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


def why_own_kind(tensor: torch.Tensor) -> str | None:
    """Why the tensor's class, and not torch, decides what an op does with it; None if torch decides."""
    kind = type(tensor)
    overridden = kind.__torch_function__ is not torch._C._disabled_torch_function_impl
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


def key_of(arguments: Arguments) -> Hashable:
    """What identifies the specialization for these arguments; equal keys mean that one capture serves both,
    as long as its guards on the dynamic sizes hold."""
    return (
        global_state(),
        torch.is_inference_mode_enabled(),
        len(arguments.args),
        tuple(arguments.kwargs),
        arguments.lists,
        tuple(map(_leaf_key, arguments.leaves)),
    )


def _leaf_key(leaf: Leaf) -> Hashable:
    value = leaf.value
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.device, sizes(leaf), strides(leaf), value.requires_grad, value.is_inference())
    if isinstance(value, (float, complex)):
        return (type(value), repr(value))  # tells 0.0 from -0.0, and NaN equals itself
    return (type(value), value)


TOKENS = "tokens"


def sizes(leaf: Leaf) -> tuple[int | str, ...]:
    """The sizes of a tensor leaf, with :data:`TOKENS` for the dynamic one."""
    shape = tuple(leaf.value.shape)
    return (TOKENS, *shape[1:]) if leaf.dynamic else shape


def strides(leaf: Leaf) -> tuple[int | tuple[str, int], ...]:
    """The strides of a tensor leaf; ``(TOKENS, k)`` stands for ``k`` times the number of tokens.

    In a column-major activation the outer strides grow with the number of tokens.
    """
    given: tuple[int, ...] = leaf.value.stride()
    if not leaf.dynamic or not given[0]:
        return given
    span = leaf.value.size(0) * given[0]
    return tuple(
        (TOKENS, stride // leaf.value.size(0)) if i and stride >= span and not stride % span else stride
        for i, stride in enumerate(given)
    )


def layout_with(leaf: Leaf, tokens: Any) -> tuple[list[Any], list[Any]]:
    """Size and stride of a tensor leaf with another number of tokens, which may be a symbol."""
    size = [tokens if isinstance(dim, str) else dim for dim in sizes(leaf)]
    stride = [tokens * dim[1] if isinstance(dim, tuple) else dim for dim in strides(leaf)]
    return size, stride


def with_tokens(leaf: Leaf, tokens: int, device: torch.device | None = None) -> torch.Tensor:
    """A tensor of zeros that is all else that a dynamic leaf would be with another number of tokens, on its device or
    another one."""
    value = leaf.value
    size, stride = layout_with(leaf, tokens)
    length = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else 0
    with torch.inference_mode(value.is_inference()):
        fresh = torch.zeros(length, dtype=value.dtype, device=device or value.device).as_strided(size, stride)
    return fresh.requires_grad_(value.requires_grad)


def activations_with_tokens(arguments: Arguments, tokens: int) -> tuple[list[Any], dict[str, Any]]:
    """``args`` and ``kwargs`` with activations of zeros that have another number of tokens, and else the same.

    Raises:
        ValueError: a negative number; no activation that has tokens, or several that have not as many.
    """
    if tokens < 0:
        raise ValueError(f"tokens must be 0 or more, not {tokens}")
    activations = {leaf.source: leaf for leaf in arguments.tensors if leaf.activation and leaf.value.dim()}
    counts = {leaf.name: leaf.value.size(0) for leaf in activations.values()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"the activations must have one number of tokens to replace, but they have {counts}")
    tensors = []
    for leaf in arguments.tensors:
        if leaf.source not in activations:
            tensors.append(leaf.value)
            continue
        tensors.append(with_tokens(replace(leaf, dynamic=True), tokens))
    return arguments.with_tensors(tensors)


def of_zeros(parameters: Parameters, arguments: Arguments, devices: Sequence[torch.device]) -> Arguments:
    """The same arguments with tensors of zeros, which are laid out as those given are, on these devices."""
    tensors = [
        with_tokens(leaf, leaf.value.size(0) if leaf.dynamic else 0, device)
        for leaf, device in zip(arguments.tensors, devices, strict=True)
    ]
    args, kwargs = arguments.with_tensors(tensors)
    return flatten(parameters, tuple(args), kwargs)


MISS = object()

# call(args, kwargs) -> result, or MISS. A generated one has its source text as its __doc__.
GuardedCall = Callable[[tuple[Any, ...], Mapping[str, Any]], Any]


def guarded(arguments: Arguments, shape_guard: str | None, result: str, names: Mapping[str, Any]) -> GuardedCall:
    """Generate ``call(args, kwargs)``: the value of ``result`` if every guard holds, else :data:`MISS`.

    Args:
        arguments: a call for which the guards hold now; its tensors and the global state are the pattern.
        shape_guard: an expression on the dynamic sizes, in terms of the leaves' sources; None for none.
        result: an expression in terms of the leaves' sources and ``names``.
        names: what ``shape_guard`` and ``result`` refer to.
    """
    scope = {
        **names,
        "MISS": MISS,
        "copysign": math.copysign,
        "forward_ad": torch.autograd.forward_ad,
        "inexact_matmul_precision": inexact_matmul_precision,
        "inference_mode": torch.is_inference_mode_enabled,
        "state_unchanged": GlobalStateGuard().check,
    }
    checks = []
    tensors = arguments.tensors
    if tensors:
        scope["tensors_match"] = _tensor_guards(tensors).check
    for i, leaf in enumerate(arguments.leaves):
        if not isinstance(leaf.value, torch.Tensor):
            checks.append(_value_guard(leaf, f"value_{i}", scope))
    if tensors:
        checks.append(f"tensors_match({', '.join(leaf.source for leaf in tensors)})")
    # TensorGuards compares dispatch keys, which in inference mode are the same with and without inference tensors.
    inference = [("inference_mode()", torch.is_inference_mode_enabled())]
    inference += [(f"{leaf.source}.is_inference()", leaf.value.is_inference()) for leaf in tensors]
    checks += [check if holds else f"not {check}" for check, holds in inference]
    checks += ["state_unchanged()", "forward_ad._current_level < 0"]
    if inexact_matmul_precision() is not None:  # GlobalStateGuard tells no more than that it is not exact
        checks.append(f"inexact_matmul_precision() == {inexact_matmul_precision()!r}")
    sizes_read, (shape_guard, result) = _read_once(shape_guard or "True", result)
    lines = [
        *_unpacking(arguments),
        f"if not ({' and '.join(checks)}):",
        "    return MISS",
        *sizes_read,
        *_returning(result, shape_guard),
    ]
    return _generated(lines, scope)


def within_shapes(arguments: Arguments, shape_guard: str | None, result: str, names: Mapping[str, Any]) -> GuardedCall:
    """Generate ``call(args, kwargs)`` for arguments with the same key: the value of ``result`` if the guard on the
    dynamic sizes holds, else None. Parameters as for :func:`guarded`."""
    scope = {**names, "MISS": None}
    return _generated([*_unpacking(arguments), *_returning(result, shape_guard or "True")], scope)


def _returning(result: str, shape_guard: str) -> list[str]:
    """Statements that return the result, or MISS if the guard does not hold: one that divides by zero does not."""
    if "/" not in shape_guard and "%" not in shape_guard:
        return [f"return {result} if {shape_guard} else MISS"]
    return [
        "try:",
        f"    if not ({shape_guard}):",
        "        return MISS",
        "except ZeroDivisionError:",
        "    return MISS",
        f"return {result}",
    ]


def _generated(lines: list[str], scope: dict[str, Any]) -> GuardedCall:
    code = "\n    ".join(["def call(args, kwargs):", *lines])
    exec(compile(code, "<dispatch_compile guards>", "exec"), scope)
    call: GuardedCall = scope["call"]
    call.__doc__ = code
    return call


def _unpacking(arguments: Arguments) -> list[str]:
    """Statements that give every argument the name by which the leaves' sources know it, or return MISS."""
    count = len(arguments.args)
    names = "".join(f"a{i}, " for i in range(count))
    lines = [
        f"if len(args) != {count} or len(kwargs) != {len(arguments.kwargs)}:",
        "    return MISS",
    ]
    if names:
        lines.append(f"{names}= args")
    for i, name in enumerate(arguments.kwargs):
        lines += [f"if {name!r} not in kwargs:", "    return MISS", f"k{i} = kwargs[{name!r}]"]
    for source, length in arguments.lists:
        lines += [f"if type({source}) not in (list, tuple) or len({source}) != {length}:", "    return MISS"]
    return lines


def _read_once(*expressions: str) -> tuple[list[str], list[str]]:
    """Give every size and stride that the expressions read a local name: reading one costs more than the rest."""
    names: dict[str, str] = {}

    def name(match: re.Match[str]) -> str:
        return names.setdefault(f"{match[1]}.{_READ_BY[match[2]]}[{match[3]}]", f"d{len(names)}")

    renamed = [_SIZE_OR_STRIDE.sub(name, expression) for expression in expressions]
    return [f"{local} = {read}" for read, local in names.items()], renamed


_SIZE_OR_STRIDE = re.compile(r"(\w+(?:\[\d+\])?)\.(size|stride)\((\d+)\)")
_READ_BY = {"size": "shape", "stride": "stride()"}


def _tensor_guards(tensors: Sequence[Leaf]) -> Any:
    def known(dims: Sequence[Any]) -> list[int | None]:
        return [dim if isinstance(dim, int) else None for dim in dims]

    return TensorGuards(
        *(leaf.value for leaf in tensors),
        dynamic_dims_sizes=[known(sizes(leaf)) for leaf in tensors],
        dynamic_dims_strides=[known(strides(leaf)) for leaf in tensors],
    )


def _value_guard(leaf: Leaf, constant: str, scope: dict[str, Any]) -> str:
    value, source = leaf.value, leaf.source
    if value is None or isinstance(value, bool):
        return f"{source} is {value}"
    scope[constant] = value
    scope[f"{constant}_type"] = type(value)
    typed = f"type({source}) is {constant}_type and "
    if isinstance(value, float):
        if math.isnan(value):
            return f"{typed}{source} != {source}"
        if value == 0.0:
            return f"{typed}{source} == 0.0 and copysign(1.0, {source}) == {math.copysign(1.0, value)}"
    if isinstance(value, complex):
        return f"{typed}repr({source}) == {repr(value)!r}"
    return f"{typed}{source} == {constant}"
