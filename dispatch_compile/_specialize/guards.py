"""The check, as generated code, that lets a call run compiled code at once."""

from __future__ import annotations

import enum
import math
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch

from .._torch.dispatch import GlobalStateGuard, TensorGuards, function_modes_active, inexact_matmul_precision
from .arguments import ABSENT, Arguments, Group, Leaf, Node, sizes, strides

MISS = object()

# call(args, kwargs) -> result, or MISS. A generated one has its source text as its __doc__.
GuardedCall = Callable[[tuple[Any, ...], Mapping[str, Any]], Any]

# The numbers that a symbol of a size, and code's 64-bit integers, can be.
_ANY_INT = "-0x8000000000000000 <= {} <= 0x7fffffffffffffff"


def guarded(
    arguments: Arguments, shape_guard: str | None, result: Sequence[str], names: Mapping[str, Any], *, of_function: bool
) -> GuardedCall:
    """Generate ``call(args, kwargs)``: what ``result`` returns if every guard holds, else :data:`MISS`.

    Args:
        arguments: a call for which the guards hold now; its tensors and the global state are the pattern.
        shape_guard: an expression on the dynamic sizes, in terms of the leaves' sources; None for none.
        result: statements in terms of the leaves' sources and ``names``, the last of which returns.
        names: what ``shape_guard`` and ``result`` refer to.
        of_function: whether it is a function that is called, so that a TorchFunctionMode may watch.
    """
    scope = {
        **names,
        "MISS": MISS,
        "ABSENT": ABSENT,
        "copysign": math.copysign,
        "forward_ad": torch.autograd.forward_ad,
        "function_modes_active": function_modes_active,
        "inexact_matmul_precision": inexact_matmul_precision,
        "inference_mode": torch.is_inference_mode_enabled,
        "state_unchanged": GlobalStateGuard().check,
    }
    checks = []
    tensors = arguments.tensors
    if tensors:
        scope["tensors_match"] = _tensor_guards(tensors).check
    # A default that is a constant stays what it is; what is in a list or an object may change.
    defaults = {root.node.source for root in arguments.roots if root.default}
    for i, leaf in enumerate(arguments.leaves):
        if not leaf.is_tensor and leaf.source not in defaults:
            checks.append(_value_guard(leaf, f"value_{i}", scope))
    if tensors:
        checks.append(f"tensors_match({', '.join(leaf.source for leaf in tensors)})")
    # TensorGuards compares dispatch keys, which in inference mode are the same with and without inference tensors.
    inference = [("inference_mode()", torch.is_inference_mode_enabled())]
    inference += [(f"{leaf.source}.is_inference()", leaf.value.is_inference()) for leaf in tensors]
    checks += [check if holds else f"not {check}" for check, holds in inference]
    checks += ["state_unchanged()", "forward_ad._current_level < 0"]
    checks += ["not function_modes_active()"] if of_function else []
    if inexact_matmul_precision() is not None:  # GlobalStateGuard tells no more than that it is not exact
        checks.append(f"inexact_matmul_precision() == {inexact_matmul_precision()!r}")
    sizes_read, (shape_guard, *result) = _read_once(shape_guard or "True", *result)
    lines = [
        *_unpacking(arguments, scope),
        f"if not ({' and '.join(checks)}):",
        "    return MISS",
        *sizes_read,
        *_guarding(shape_guard),
        *result,
    ]
    code = "\n    ".join(["def call(args, kwargs):", *lines])
    exec(compile(code, "<dispatch_compile guards>", "exec"), scope)
    call: GuardedCall = scope["call"]
    call.__doc__ = code
    return call


def holds(condition: str | None, arguments: Arguments, names: Mapping[str, Any]) -> bool:
    """Whether a condition on the dynamic sizes holds for arguments that have the key; None is no condition."""
    try:
        return condition is None or bool(evaluated(condition, arguments, names))
    except ZeroDivisionError:  # one that divides by zero does not hold
        return False


def evaluated(expression: str, arguments: Arguments, names: Mapping[str, Any]) -> Any:
    """The value of an expression in terms of the leaves' sources and ``names``."""
    return eval(expression, {**names, **arguments.values})


def _guarding(shape_guard: str) -> list[str]:
    """Statements that return MISS if the guard does not hold: one that divides by zero does not."""
    if shape_guard == "True":
        return []
    if "/" not in shape_guard and "%" not in shape_guard:
        return [f"if not ({shape_guard}):", "    return MISS"]
    return [
        "try:",
        f"    if not ({shape_guard}):",
        "        return MISS",
        "except ZeroDivisionError:",
        "    return MISS",
    ]


def _unpacking(arguments: Arguments, scope: dict[str, Any]) -> list[str]:
    """Statements that give every leaf the name by which its source knows it, or return MISS."""
    given = [root for root in arguments.roots if not root.default]
    positional = [root.node for root in given if root.keyword is None]
    by_keyword = [(root.keyword, root.node) for root in given if root.keyword is not None]
    lines = [
        f"if len(args) != {len(positional)} or len(kwargs) != {len(by_keyword)}:",
        "    return MISS",
    ]
    if positional:
        lines.append(f"{''.join(f'{node.source}, ' for node in positional)}= args")
    for name, node in by_keyword:
        lines += [f"if {name!r} not in kwargs:", "    return MISS", f"{node.source} = kwargs[{name!r}]"]
    for root in arguments.roots:
        if root.default:
            scope[f"default_{root.node.source}"] = root.value
            lines.append(f"{root.node.source} = default_{root.node.source}")
    reading = [line for root in arguments.roots for line in _reading(root.node, scope)]
    if any(isinstance(root.node, Group) and _reads_objects(root.node) for root in arguments.roots):
        missing = "except (AttributeError, KeyError, IndexError, TypeError):"
        return [*lines, "try:", *(f"    {line}" for line in reading), missing, "    return MISS"]
    return [*lines, *reading]


def _reads_objects(node: Node) -> bool:
    return isinstance(node, Group) and (node.owner is not None or any(map(_reads_objects, node.items)))


def _reading(node: Node, scope: dict[str, Any]) -> Iterator[str]:
    """Statements that check what a group is, and read what is in it."""
    if isinstance(node, Leaf):
        return
    source, kinds = node.source, f"kinds_{node.source}"
    scope[kinds] = node.kinds if node.owner is None else weakref.ref(node.kinds[0])  # a class may hold the function
    wrong = f"type({source}) not in {kinds}" if node.owner is None else f"type({source}) is not {kinds}()"
    if node.owner is None:
        wrong += f" or len({source}) != {len(node.items)}"
        if issubclass(node.kinds[0], dict):
            wrong += f" or list({source}) != {list(node.keys)!r}"
    yield f"if {wrong}:"
    yield "    return MISS"
    for item in node.items:
        yield f"{item.source} = {item.read}"
        yield from _reading(item, scope)


def _read_once(*expressions: str) -> tuple[list[str], list[str]]:
    """Give every size and stride that the expressions read a local name: reading one costs more than the rest."""
    names: dict[str, str] = {}

    def name(match: re.Match[str]) -> str:
        return names.setdefault(f"{match[1]}.{_READ_BY[match[2]]}[{match[3]}]", f"d{len(names)}")

    renamed = [_SIZE_OR_STRIDE.sub(name, expression) for expression in expressions]
    return [f"{local} = {read}" for read, local in names.items()], renamed


_SIZE_OR_STRIDE = re.compile(r"\b(a\d+(?:_\d+)*)\.(size|stride)\((\d+)\)")
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
    if value is ABSENT:
        return f"{source} is ABSENT"
    scope[constant] = value
    if isinstance(value, (enum.Enum, type, FunctionType, BuiltinFunctionType)):
        return f"{source} is {constant}"
    scope[f"{constant}_type"] = type(value)
    typed = f"type({source}) is {constant}_type"
    if leaf.dynamic:
        return f"{typed} and {_ANY_INT.format(source)}" if isinstance(value, int) else typed
    if isinstance(value, float):
        if math.isnan(value):
            return f"{typed} and {source} != {source}"
        if value == 0.0:
            return f"{typed} and {source} == 0.0 and copysign(1.0, {source}) == {math.copysign(1.0, value)}"
    if isinstance(value, complex):
        return f"{typed} and repr({source}) == {repr(value)!r}"
    return f"{typed} and {source} == {constant}"
