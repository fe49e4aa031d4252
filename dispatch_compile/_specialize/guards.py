"""The check, as generated code, that lets a call run compiled code at once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .._torch.dispatch import GlobalStateGuard, TensorGuards, function_modes_active, inexact_matmul_precision
from .arguments import ABSENT, Arguments, Group, Leaf, Node
from .key import SHAPE, STRIDE, Fact, facts_of, state_facts

MISS = object()

# call(args, kwargs) -> result, or MISS. A generated one has its source text as its __doc__.
GuardedCall = Callable[[tuple[Any, ...], Mapping[str, Any]], Any]


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
    # A default that is a constant stays what it is; what is in a list or an object may change.
    defaults = {root.node.source for root in arguments.roots if root.default}
    tensors = arguments.tensors
    constants = [leaf for leaf in arguments.leaves if not leaf.is_tensor and leaf.source not in defaults]
    checks = [check for leaf in constants for check in _checks(facts_of(leaf), scope)]
    if tensors:
        scope["tensors_match"] = _tensor_guards(tensors).check
        checks.append(f"tensors_match({', '.join(leaf.source for leaf in tensors)})")
    checks += _checks(state_facts(), scope)
    checks += [check for leaf in tensors for check in _checks(facts_of(leaf), scope)]
    checks += ["state_unchanged()", "forward_ad._current_level < 0"]
    checks += ["not function_modes_active()"] if of_function else []
    sizes_read, (shape_guard, *result) = _read_once(shape_guard or "True", *result)
    checking = [f"if not ({' and '.join(checks)}):", "    return MISS", *sizes_read, *_guarding(shape_guard)]
    lines = [*_unpacking(arguments, scope), *checking, *result]
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
    lines = [] if shape_guard == "True" else [f"if not ({shape_guard}):", "    return MISS"]
    return _missing_on("ZeroDivisionError", lines) if "/" in shape_guard or "%" in shape_guard else lines


def _missing_on(errors: str, lines: Sequence[str]) -> list[str]:
    return ["try:", *(f"    {line}" for line in lines), f"except {errors}:", "    return MISS"]


def _unpacking(arguments: Arguments, scope: dict[str, Any]) -> list[str]:
    """Statements that give every leaf the name by which its source knows it, or return MISS."""
    given = [root for root in arguments.roots if not root.default]
    positional = [root.node for root in given if root.keyword is None]
    by_keyword = [(root.keyword, root.node) for root in given if root.keyword is not None]
    lines = [f"if len(args) != {len(positional)} or len(kwargs) != {len(by_keyword)}:", "    return MISS"]
    if positional:
        lines.append(f"{''.join(f'{node.source}, ' for node in positional)}= args")
    for name, node in by_keyword:
        lines += [f"if {name!r} not in kwargs:", "    return MISS", f"{node.source} = kwargs[{name!r}]"]
    for root in arguments.roots:
        if root.default:
            scope[f"default_{root.node.source}"] = root.value
            lines.append(f"{root.node.source} = default_{root.node.source}")
    reading = [line for root in arguments.roots for line in _reading(root.node, scope)]
    if any(isinstance(node, Group) and node.owner is not None for node in arguments.nodes):
        reading = _missing_on("(AttributeError, KeyError, IndexError, TypeError)", reading)
    return [*lines, *reading]


def _reading(node: Node, scope: dict[str, Any]) -> Iterator[str]:
    """Statements that check what a group is, and read what is in it."""
    if isinstance(node, Leaf):
        return
    yield f"if not ({' and '.join(_checks(facts_of(node), scope))}):"
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


def _checks(facts: Iterable[Fact], scope: dict[str, Any]) -> list[str]:
    """What compares facts, with what it refers to in the scope; nothing for those that torch's guards compare."""
    guarded = [fact for fact in facts if fact.guard]
    for fact in guarded:
        scope.update(fact.scope)
    return [fact.guard for fact in guarded]


def _tensor_guards(tensors: Sequence[Leaf]) -> Any:
    def known(aspect: str) -> list[Any]:
        dims = [fact.value for leaf in tensors for fact in facts_of(leaf) if fact.aspect == aspect]
        return [[dim if isinstance(dim, int) else None for dim in each] for each in dims]

    values = (leaf.value for leaf in tensors)
    return TensorGuards(*values, dynamic_dims_sizes=known(SHAPE), dynamic_dims_strides=known(STRIDE))
