"""Which ops are meant: by a mode's ``ops=``, or by a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .._torch.dispatch import OpOverload, OpOverloadPacket, has_schema, overload_named
from .protocol import overloads, overloads_or_none
from .registry import known_ops


def overload_of(op: Any, asked_by: str) -> OpOverload:
    """The overload that is meant by an IR op object, an ``OpOverload``, an ``OpOverloadPacket`` or ``"ns::name"``.

    Raises:
        ValueError: no such op, or several overloads; the message begins with ``asked_by``.
        TypeError: ``op`` is none of these.
    """
    if isinstance(op, OpOverload):
        return op
    if isinstance(op, str):
        namespace, _, rest = op.partition("::")
        name, _, overload_name = rest.partition(".")
        packet = getattr(getattr(torch.ops, namespace), name, None) if rest else None
        if packet is None:
            raise ValueError(f'{asked_by}: no op {op!r}; write "namespace::name" of a registered op')
        op = getattr(packet, overload_name, None) if overload_name else packet
        if op is None:
            raise ValueError(f"{asked_by}: {packet} has no overload {overload_name!r}")
        return overload_of(op, asked_by)
    if isinstance(op, OpOverloadPacket):
        candidates = [
            name for name in op.overloads() if is_registered(overload_named(op, name))
        ]  # not those of TorchScript
        if "default" in candidates or len(candidates) == 1:
            return overload_named(op, "default" if "default" in candidates else candidates[0])
        raise ValueError(f"{asked_by}: {op} has the overloads {candidates}; name the one you mean")
    torch_op = getattr(op, "torch_op", None)
    if isinstance(torch_op, OpOverload):
        return torch_op
    raise TypeError(f"{asked_by}: op must be an OpOverload (torch.ops.ns.name.default) or 'ns::name', not {op!r}")


def is_registered(overload: OpOverload) -> bool:
    return has_schema(overload.name())


Selects = Callable[[Any, "OpOverload | None"], bool]


def selection(ops: Iterable[Any] | None) -> Selects:
    """The test whether a mode's ``ops=`` selects an overload of an IR op, or a native, which has no overload.

    Raises:
        ValueError: an item that names no IR op known now.
        TypeError: an item of another kind.
    """
    if ops is None:
        return lambda op, overload: True
    if isinstance(ops, (str, OpOverload, OpOverloadPacket)) or not isinstance(ops, Iterable):
        ops = (ops,)
    tests = [_item_test(item) for item in ops]

    def selects(op: Any, overload: OpOverload | None) -> bool:
        return any(test(op, overload) for test in tests)

    return selects


def _names(op: Any, overload: OpOverload | None) -> tuple[str, ...]:
    """The names that select an overload: ``ns``, ``ns::name`` and, as in a trace, ``ns::name.overload``; or a native:
    its module and its name."""
    if overload is None:
        return op.module, op.name
    qualified: str = overload._schema.name
    return overload.namespace, qualified, f"{qualified}.{overload._overloadname}"


def _item_test(item: Any) -> Selects:
    test: Selects
    if isinstance(item, str):
        test = lambda op, overload: item in _names(op, overload)  # noqa: E731
        what = f"namespace or op {item!r}"
    elif isinstance(item, OpOverload):
        test = lambda op, overload: overload is item  # noqa: E731
        what = f"op {item}"
    elif isinstance(item, OpOverloadPacket):
        test = lambda op, overload: overload is not None and overload.overloadpacket is item  # noqa: E731
        what = f"op {item}"
    elif hasattr(item, "dispatch_compile_native"):
        test = lambda op, overload: op is item.dispatch_compile_native  # noqa: E731
        what = f"function {item.dispatch_compile_native.name}"
    elif hasattr(item, "torch_op"):
        wanted = set(overloads(item))
        test = lambda op, overload: overload in wanted  # noqa: E731
        what = f"op {item}"
    else:
        raise TypeError(
            f"ops: {item!r} is not an IR op; give IrOp objects, OpOverloads, OpOverloadPackets, functions that are "
            f"natives, namespace names or 'ns::name'"
        )
    known = known_ops()
    if not any(test(op, overload) for op in known for overload in overloads_or_none(op)):
        namespaces = sorted({overload.namespace for op in known for overload in overloads(op)})
        raise ValueError(
            f"ops: no IR op is known for {what} (namespaces with IR ops: {namespaces}). Import the library that "
            f"registers it first, or give the op a reference implementation with dispatch_compile.register_native"
        )
    return test
