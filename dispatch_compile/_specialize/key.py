"""What of a call is baked into compiled code, said once, as facts.

What identifies a specialization is their values; its guard is made of their checks; what people read are their texts.
"""

from __future__ import annotations

import enum
import math
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType, MappingProxyType
from typing import Any, NamedTuple

import torch

from .._torch.capture import dtype_abbreviation
from .._torch.dispatch import global_state
from .arguments import TOKENS, Arguments, Group, Leaf, Node, sizes, strides

SHAPE, STRIDE, KEYS = "shape", "stride", "keys"


class Fact(NamedTuple):
    """One thing that is baked in.

    Attributes:
        aspect: which, for people; empty for what a part of the arguments is in the first place.
        value: what is compared; sizes and strides have what :func:`.arguments.sizes` has in place of dynamic ones.
        reading: the value for people.
        guard: the expression that compares what is there in another call, in terms of the source; empty where torch's
            TensorGuards and GlobalStateGuard do, and where there is nothing to compare.
        scope: what the guard refers to by names of its own.
    """

    aspect: str
    value: Any  # hashable
    reading: Callable[[Any], str] = str
    guard: str = ""
    scope: Mapping[str, Any] = MappingProxyType({})

    @property
    def text(self) -> str:
        """The value for people."""
        return self.reading(self.value)


def key_of(arguments: Arguments) -> Hashable:
    """What identifies the specialization for these arguments; equal keys mean that one capture serves both,
    as long as its guards on the dynamic sizes hold. How the arguments are given, by position or not, is no part."""
    nodes = sorted(arguments.nodes, key=lambda node: node.source)
    return (values(state_facts()), tuple((node.source, *values(facts_of(node))) for node in nodes))


def values(facts: Iterable[Fact]) -> tuple[Hashable, ...]:
    """What is compared of facts."""
    return tuple(fact.value for fact in facts)


def facts_of(node: Node) -> Iterator[Fact]:
    """What is baked in of a part of the arguments by itself; what is in it has its own facts."""
    if isinstance(node, Group):
        yield from _of_group(node)
    elif node.is_tensor:
        yield from _of_tensor(node)
    else:
        yield _of_constant(node)


def state_facts() -> tuple[Fact, ...]:
    """What is baked in of the thread's state and torch's global state."""
    return _of_state(torch.is_inference_mode_enabled(), global_state())


@lru_cache(maxsize=64)
def _of_state(inference_mode: bool, state: tuple[tuple[str, Hashable], ...]) -> tuple[Fact, ...]:
    guards = {"inference_mode": "inference_mode()" if inference_mode else "not inference_mode()"}
    precision = dict(state)["inexact_matmul_precision"]
    if precision is not None:  # GlobalStateGuard tells no more than that it is not exact
        guards["inexact_matmul_precision"] = f"inexact_matmul_precision() == {precision!r}"
    every = (("inference_mode", inference_mode), *state)
    return tuple(Fact(name.replace("_", " "), value, _on_or_off, guards.get(name, "")) for name, value in every)


def _on_or_off(value: object) -> str:
    return ("off", "on")[value] if isinstance(value, bool) else str(value)


def _of_tensor(leaf: Leaf) -> Iterator[Fact]:
    value, inference = leaf.value, leaf.value.is_inference()
    yield Fact("", value.dtype, dtype_abbreviation)
    yield Fact(SHAPE, sizes(leaf), _dimensions)
    yield Fact(STRIDE, strides(leaf), _dimensions)
    yield Fact("device", value.device)
    yield Fact("requires_grad", value.requires_grad)
    # TensorGuards compares dispatch keys, which in inference mode are the same with and without inference tensors.
    check = f"{leaf.source}.is_inference()"
    yield Fact("is_inference()", inference, guard=check if inference else f"not {check}")


def _dimensions(dims: tuple[int | str | tuple[str, int], ...]) -> str:
    texts = (str(d) if isinstance(d, int) else "s0" if d in (TOKENS, (TOKENS, 1)) else f"{d[1]}*s0" for d in dims)
    return f"[{', '.join(texts)}]"


def _of_constant(leaf: Leaf) -> Fact:
    value, kind, constant = leaf.value, type(leaf.value), f"value_{leaf.source[1:]}"
    # The text of a number with a fraction tells 0.0 from -0.0, and is the same for every NaN.
    known = repr(value) if isinstance(value, (float, complex)) else value
    scope = {constant: value, f"{constant}_type": kind}
    return Fact("", (kind,) if leaf.dynamic else (kind, known), _constant_text, _constant_guard(leaf, constant), scope)


def _constant_text(compared: tuple[Any, ...]) -> str:
    kind, *constant = compared
    if not constant:
        return f"any {kind.__name__}"
    return str(*constant) if issubclass(kind, (float, complex)) else repr(*constant)


def _constant_guard(leaf: Leaf, constant: str) -> str:
    value, source = leaf.value, leaf.source
    if value is None or isinstance(value, bool):
        return f"{source} is {value}"
    if isinstance(value, (enum.Enum, type, FunctionType, BuiltinFunctionType)):
        return f"{source} is {constant}"
    equal = f"{source} == {constant}"
    if leaf.dynamic:  # the numbers that a symbol of a size, and code's 64-bit integers, can be
        equal = f"-0x8000000000000000 <= {source} <= 0x7fffffffffffffff" if isinstance(value, int) else ""
    elif isinstance(value, complex):
        equal = f"repr({source}) == {repr(value)!r}"
    elif isinstance(value, float) and math.isnan(value):
        equal = f"{source} != {source}"
    elif isinstance(value, float) and value == 0.0:
        equal = f"{source} == 0.0 and copysign(1.0, {source}) == {math.copysign(1.0, value)}"
    return " and ".join(filter(None, [f"type({source}) is {constant}_type", equal]))


def _of_group(group: Group) -> Iterator[Fact]:
    source, kinds = group.source, f"kinds_{group.source}"
    if group.owner is not None:  # a class is not kept alive, since the function that the key is of may be its method
        kind = Kind(group.kinds[0])
        yield Fact("", kind, guard=f"type({source}) is {kinds}()", scope={kinds: kind})
        yield Fact(KEYS, tuple(step.code("") for step in group.keys))  # reading one that is not there is an error
        return
    yield Fact("", group.kinds, lambda kinds: kinds[0].__name__, f"type({source}) in {kinds}", {kinds: group.kinds})
    length = f"len({source}) == {len(group.keys)}"
    same = f" and list({source}) == {[*group.keys]!r}" if issubclass(group.kinds[0], dict) else ""
    yield Fact(KEYS, group.keys, guard=length + same)


class Kind(weakref.ref[type]):
    """The class of an object, weakly."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(self())

    def __str__(self) -> str:
        return getattr(self(), "__qualname__", "a class that is gone")
