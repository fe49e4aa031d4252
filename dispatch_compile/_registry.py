"""Which ops are known: every source of IR ops that the package can find, and reference implementations
that users register for ops of other libraries."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.library import infer_schema

from ._checks import check_implementation, checked_activations
from ._errors import DispatchCompileWarning
from ._fork import freed_in_children
from ._hooks import hookable
from ._torch_private import OpOverload, OpOverloadPacket, has_kernel, has_schema

if TYPE_CHECKING:
    from ._ir import Op

KERNEL = "kernel"  # what stands for a provider where an op of another library runs its own kernel

Source = Callable[[], Iterable["Op"]]

_sources: list[Source] = []
_polled: list[Source] = []
_quick: list[Source] = []
_called_through_torch: list[Callable[[], AbstractContextManager[object]]] = []
_listeners: list[Callable[[], None]] = []


def add_source(
    source: Source,
    *,
    poll: Source | None = None,
    called_through_torch: Callable[[], AbstractContextManager[object]] | None = None,
) -> None:
    """Add a function that lists IR ops.

    It says when its list changes, with :func:`changed`. If it cannot, ``poll`` lists the same ops; it is called
    whenever a mode is entered, so it must be quick. Where its ops may be called past torch, ``called_through_torch``
    makes a context in which they are not.
    """
    _sources.append(source)
    _quick.append(poll or source)
    if poll is not None:
        _polled.append(poll)
    if called_through_torch is not None:
        _called_through_torch.append(called_through_torch)


@contextmanager
def called_through_torch() -> Iterator[None]:
    """Inside, every call of an IR op on this thread is a call of its torch op, which tracing sees."""
    with ExitStack() as entered:
        for context in _called_through_torch:
            entered.enter_context(context())
        yield


def on_change(listener: Callable[[], None]) -> None:
    """Call ``listener`` after an op was registered or removed through this package."""
    _listeners.append(listener)


_generations = itertools.count(1)
generation = 0  # another number after each change to ops, implementations or priorities that is told of


def dispatch_changed() -> None:
    """Say that an op may choose another implementation from now on."""
    global generation
    generation = next(_generations)


def changed() -> None:
    """Tell the listeners that an op was registered or removed."""
    dispatch_changed()
    for listener in _listeners:
        listener()


def known_ops() -> list[Op]:
    """Every IR op known now, from all sources."""
    return [op for source in _sources for op in source()]


def torch_ops() -> list[Any]:
    """Those of them that are called through torch; quicker, for those that are polled are not looked at."""
    return [op for source in _quick for op in source() if hasattr(op, "torch_op")]


def op_meant_by(value: Any) -> Any | None:
    """The IR op that is called by ``value``: the op itself, one of its overloads, or their packet."""
    for op in torch_ops():
        if value is op or value is getattr(op, "maybe_inplace", op) or value is op.torch_op.overloadpacket:
            return op
        if isinstance(value, OpOverload) and any(value.name() == overload.name() for overload in overloads(op)):
            return op
    return None


def polled_ops() -> list[Op]:
    """The ops of the sources that do not say when they change."""
    return [op for source in _polled for op in source()]


def overloads(op: Op) -> Iterator[OpOverload]:
    """The torch ops by which ``op`` is called: the functional one and, if it has one, ``maybe_inplace``. A function has
    none."""
    torch_op = getattr(op, "torch_op", None)
    if torch_op is None:
        return
    yield torch_op
    inplace = getattr(op, "maybe_inplace", None)
    if inplace is not None:
        yield inplace.torch_op


def overloads_or_none(op: Op) -> list[OpOverload | None]:
    """The same, and None for a function."""
    return list(overloads(op)) or [None]


class NativeImpl:
    """The reference implementation given to :func:`register_native`."""

    provider = "native"

    def __init__(self, torch_op: OpOverload, fn: Callable[..., Any]) -> None:
        self.torch_op = torch_op
        self.impl_fn = fn

    def func_impl_fn(self, *args: Any, **kwargs: Any) -> Any:
        return self.impl_fn(*args, **kwargs)


class NativeOp:
    """An op of another library together with its reference implementation.

    Attributes:
        eager_provider: what a trace calls the kernel that runs where the reference is not compiled: the op's own.
        automatic: whether activations are found out, beside those that are named as such.
    """

    eager_provider = KERNEL
    registry: dict[OpOverload, NativeOp] = {}  # noqa: RUF012 - one registry for the class, as in IrOp
    tells_of_changes = True  # by dispatch_changed()

    def __init__(
        self, torch_op: OpOverload, fn: Callable[..., Any], activations: list[str], automatic: bool = True
    ) -> None:
        self.torch_op = torch_op
        self.activations = activations
        self.automatic = automatic
        self._impl = NativeImpl(torch_op, fn)

    def dispatch(self, *args: Any, **kwargs: Any) -> NativeImpl:
        return self._impl


add_source(lambda: NativeOp.registry.values())


def implementations_tried(op: Any) -> list[Any]:
    """The implementations that an op's dispatch tries, in order, up to one that takes any arguments."""
    if isinstance(op, NativeOp):
        return [op.dispatch()]
    tried = []
    for provider in op.get_priority():
        impl = op.impls[provider]
        tried.append(impl)
        if impl.supports_all_args:
            return tried
    return [*tried, op.impls["native"]]


def supports_args_of(impl: Any) -> Callable[..., Any] | None:
    """The function that says which arguments an implementation takes; None if it takes any."""
    return None if getattr(impl, "supports_all_args", True) else impl._supports_args


_registry_lock = freed_in_children(threading.Lock())


class NativeHandle:
    """What :func:`register_native` returns; :meth:`remove` undoes the registration."""

    def __init__(self, op: OpOverload) -> None:
        self._op: OpOverload | None = op

    def remove(self) -> None:
        """Forget the reference implementation; what was compiled of it is freed. Harmless when repeated."""
        with _registry_lock:
            op, self._op = self._op, None
            if op is None:
                return
            del NativeOp.registry[op]
        changed()


def register_native(
    op: OpOverload | OpOverloadPacket | str,
    fn: Callable[..., Any],
    *,
    activations: Sequence[str] | None = None,
) -> NativeHandle:
    """Give an op of any library a reference implementation, which runs compiled inside a mode.

    Args:
        op: ``torch.ops.ns.name.overload``, ``torch.ops.ns.name`` if it has one overload, or ``"ns::name"``.
        fn: plain PyTorch, a function of its arguments alone, with type hints and the op's own schema. Its results must
            have the op's dtypes, shapes and strides: a call for which new code is made raises a :class:`CompileError`
            if they have not.
        activations: parameters whose dimension 0 is the token dimension; by default those that start with ``x``.

    Returns:
        A handle whose ``remove()`` undoes the registration.

    Raises:
        ValueError: no such op, schemas that differ (both are named), an op that already has a reference
            implementation or a BackendSelect kernel, or that returns a view of an argument; an activation that is no
            parameter, or no tensor.
        TypeError: ``op`` is none of the above; ``fn`` is no plain function, but a ``partial``, say, or a compiled one.

    Warns:
        DispatchCompileWarning: a CompositeImplicitAutograd op, which torch decomposes above the key where calls are
            caught, except in inference mode.
    """
    overload = overload_of(op, "register_native")
    schema = overload._schema
    asked_by = f"register_native: {overload}"
    if not _is_registered(overload):
        raise ValueError(f"{asked_by} is not registered, or no longer")
    check_implementation(fn, asked_by, methods=True)
    for argument in schema.arguments:
        if argument.alias_info is not None and not argument.alias_info.is_write:
            raise ValueError(
                f"{asked_by} returns a view of its argument {argument.name!r}; only ops that return new tensors, or "
                f"write to arguments, compile"
            )
    _check_schema(overload, fn)
    automatic = activations is None
    activations = checked_activations(asked_by, {a.name: str(a.type) for a in schema.arguments}, activations)
    if not hookable(overload):
        raise ValueError(
            f"register_native: {overload} has a BackendSelect kernel of its own (it picks a device from an "
            f"argument), so its calls cannot be intercepted"
        )
    if has_kernel(overload, "CompositeImplicitAutograd"):
        warnings.warn(
            f"register_native: torch decomposes {overload} before a call of it can be caught, but in inference mode. "
            f"Register its kernel as CompositeExplicitAutograd, or for a backend, to have it caught everywhere",
            DispatchCompileWarning,
            stacklevel=2,
        )
    with _registry_lock:
        if overload in NativeOp.registry or any(overload in overloads(known) for known in known_ops()):
            raise ValueError(f"register_native: {overload} already has a native implementation")
        NativeOp.registry[overload] = NativeOp(overload, fn, activations, automatic)
    changed()
    return NativeHandle(overload)


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
        candidates = [name for name in op.overloads() if _is_registered(getattr(op, name))]  # not those of TorchScript
        if "default" in candidates or len(candidates) == 1:
            return getattr(op, "default" if "default" in candidates else candidates[0])
        raise ValueError(f"{asked_by}: {op} has the overloads {candidates}; name the one you mean")
    if isinstance(getattr(op, "torch_op", None), OpOverload):
        return op.torch_op
    raise TypeError(f"{asked_by}: op must be an OpOverload (torch.ops.ns.name.default) or 'ns::name', not {op!r}")


def _is_registered(overload: OpOverload) -> bool:
    return has_schema(overload.name())


def _check_schema(overload: OpOverload, fn: Callable[..., Any]) -> None:
    wanted = overload._schema
    mutated = [a.name for a in wanted.arguments if a.alias_info is not None and a.alias_info.is_write]
    try:
        inferred = infer_schema(fn, mutates_args=mutated)
    except ValueError as error:
        raise ValueError(
            f"register_native: no schema can be made of the reference implementation's signature: {error}\n"
            f"The op's schema is {wanted}"
        ) from error
    if _comparable(torch._C.parse_schema(f"{overload.name()}{inferred}")) != _comparable(wanted):
        raise ValueError(
            f"register_native: the reference implementation's schema differs from the op's:\n"
            f"  implementation: {inferred}\n  {overload}: {wanted}"
        )


def _comparable(schema: torch._C.FunctionSchema) -> object:
    """A schema without what an op's author may write in two ways: ``int`` or ``SymInt``, names of alias sets."""

    def plain(type_: object) -> str:
        return str(type_).replace("SymInt", "int")

    arguments = [
        (a.name, plain(a.type), repr(a.default_value), a.kwarg_only, bool(a.alias_info and a.alias_info.is_write))
        for a in schema.arguments
    ]
    return arguments, [plain(r.type) for r in schema.returns]


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
