"""Which ops are meant: by a mode's ``ops=``, or by a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch

from .._torch.dispatch import OpOverload, OpOverloadPacket, has_schema, overload_named
from .protocol import Op, WithOverload, overloads, overloads_or_none
from .registry import known_ops

if TYPE_CHECKING:
    from .._native import Native


# What an op, or a function that is a native, is meant by.
Selectable = WithOverload | OpOverload | OpOverloadPacket | str | Callable[..., Any]


def overload_of(op: Selectable, asked_by: str) -> OpOverload:
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
        named = getattr(packet, overload_name, None) if overload_name else packet
        if named is None:
            raise ValueError(f"{asked_by}: {packet} has no overload {overload_name!r}")
        return overload_of(named, asked_by)
    if isinstance(op, OpOverloadPacket):
        return _only_overload(op, asked_by)
    torch_op = getattr(op, "torch_op", None)
    if isinstance(torch_op, OpOverload):
        return torch_op
    raise TypeError(f"{asked_by}: op must be an OpOverload (torch.ops.ns.name.default) or 'ns::name', not {op!r}")


def _only_overload(packet: OpOverloadPacket, asked_by: str) -> OpOverload:
    names = [
        name for name in packet.overloads() if is_registered(overload_named(packet, name))
    ]  # none of TorchScript's
    if "default" in names or len(names) == 1:
        return overload_named(packet, "default" if "default" in names else names[0])
    raise ValueError(f"{asked_by}: {packet} has the overloads {names}; name the one you mean")


def is_registered(overload: OpOverload) -> bool:
    return has_schema(overload.name())


Selects = Callable[[Op, "OpOverload | None"], bool]


def selection(ops: Iterable[Selectable] | None) -> Selects:
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

    def selects(op: Op, overload: OpOverload | None) -> bool:
        return any(test(op, overload) for test in tests)

    return selects


def _names(op: Op, overload: OpOverload | None) -> tuple[str, ...]:
    """The names that select an overload: ``ns``, ``ns::name`` and, as in a trace, ``ns::name.overload``; or a native:
    its module and its name."""
    if overload is None:
        native = cast("Native", op)
        return native.module, native.name
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
