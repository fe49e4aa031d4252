"""Reference implementations that users register for ops of other libraries."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch.library import infer_schema

from .._basics.checks import check_implementation, checked_activations
from .._basics.errors import DispatchCompileWarning
from .._basics.fork import freed_in_children
from .._dispatch.hooks import hookable
from .._torch.dispatch import FunctionSchema, OpOverload, OpOverloadPacket, has_kernel, parse_schema
from .protocol import KERNEL, overloads
from .registry import add_source, changed, known_ops
from .selection import is_registered, overload_of


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

_registry_lock = freed_in_children(threading.Lock())


class NativeHandle:
    """Returned by :func:`register_native`; :meth:`remove` undoes the registration."""

    def __init__(self, op: OpOverload) -> None:
        self._op: OpOverload | None = op

    def remove(self) -> None:
        """Forget the reference implementation, and free the code that was compiled of it. Harmless when repeated."""
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
    """Give an op of any library a reference implementation, which runs compiled inside a mode in place of the op's
    kernel.

    Use it for ops that exist already. For an op of your own, :func:`register_op` is shorter.

    >>> @torch.library.custom_op("docs::double", mutates_args=())
    ... def double(x: torch.Tensor) -> torch.Tensor:
    ...     return x + x
    >>> def reference(x: torch.Tensor) -> torch.Tensor:
    ...     return 2 * x
    >>> handle = dc.register_native("docs::double", reference)
    >>> with dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), trace=True) as mode:
    ...     y = torch.ops.docs.double(torch.ones(8))
    >>> print(mode.trace)
    docs::double(t: f32[8])  ->  t: f32[8]  # compiled native, new: [s0]
    >>> handle.remove()

    Args:
        op: ``torch.ops.ns.name.overload``, ``torch.ops.ns.name`` if it has one overload, or ``"ns::name"``.
        fn: plain PyTorch, a function of its arguments alone, with type hints that give the op's own schema. It may
            write to the arguments that the op writes to. Its results must have the op's dtypes, shapes and strides.
            Otherwise each call that needs new code raises a :class:`CompileError` that names both.
        activations: the parameters whose dimension 0 is the token dimension; by default those that start with ``x``.

    Returns:
        A handle; its ``remove()`` undoes the registration.

    Raises:
        ValueError: there is no such op; it has several overloads; the schemas differ (the text shows both); the op has
            a reference implementation already, has a BackendSelect kernel, or returns a view of an argument; an
            activation is not a parameter, or not a tensor.
        TypeError: ``op`` is none of the above; ``fn`` is not a plain function, but compiled or a ``partial``, say;
            ``activations`` is not a list of names.

    Warns:
        DispatchCompileWarning: the op is CompositeImplicitAutograd. torch decomposes its calls before they can be
            caught, except in inference mode.
    """
    overload = overload_of(op, "register_native")
    schema = overload._schema
    asked_by = f"register_native: {overload}"
    if not is_registered(overload):
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
    if _comparable(parse_schema(f"{overload.name()}{inferred}")) != _comparable(wanted):
        raise ValueError(
            f"register_native: the reference implementation's schema differs from the op's:\n"
            f"  implementation: {inferred}\n  {overload}: {wanted}"
        )


def _comparable(schema: FunctionSchema) -> object:
    """A schema without what an op's author may write in two ways: ``int`` or ``SymInt``, names of alias sets."""

    def plain(type_: object) -> str:
        return str(type_).replace("SymInt", "int")

    arguments = [
        (a.name, plain(a.type), repr(a.default_value), a.kwarg_only, bool(a.alias_info and a.alias_info.is_write))
        for a in schema.arguments
    ]
    return arguments, [plain(r.type) for r in schema.returns]
