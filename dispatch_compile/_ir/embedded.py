"""The embedded IR: ops that have a native implementation, and providers that compete by priority.

The surface is that of ``vllm.ir``, so that the rest of the package serves either kind of op by the same
attributes (:class:`Op`, :class:`Impl`), and an op can move from here to vLLM unchanged.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import torch
from torch.library import Library, infer_schema

from .._basics.checks import check_bools, check_implementation, check_plain, checked_activations, checked_names
from .._torch.dispatch import OpOverload, overload_named, parse_schema
from . import registry
from .protocol import NATIVE

NAMESPACE = "dispatch_compile"
_NAME = re.compile(r"[a-z_][a-z0-9_]*\Z")


class IrOpImpl:
    """One implementation of an :class:`IrOp`; :meth:`IrOp.register_impl` makes it, and :attr:`IrOp.impls` lists them.

    >>> impl = dc.ops.rms_norm.impls["native"]
    >>> impl.provider, impl.supported, impl.inplace
    ('native', True, False)

    Attributes:
        op: the op.
        provider: the implementation's name.
        impl_fn: the function.
        supported: whether this machine can run it.
        inplace: whether it writes its results into its activations.
    """

    def __init__(
        self,
        op: IrOp,
        provider: str,
        impl_fn: Callable[..., Any],
        *,
        supported: bool = True,
        supports_args: Callable[..., bool] | None = None,
        inplace: bool = False,
    ) -> None:
        self.op = op
        self.provider = provider
        self.impl_fn = impl_fn
        self.supported = supported
        self.inplace = inplace
        self._supports_args = supports_args

    @property
    def supports_all_args(self) -> bool:
        """Whether the implementation takes all arguments that the op's schema admits.

        >>> dc.ops.rms_norm.impls["native"].supports_all_args
        True
        """
        return self._supports_args is None

    def supports_args(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the implementation takes these arguments; the op's dispatch asks this.

        >>> dc.ops.silu_and_mul.impls["native"].supports_args(torch.ones(8, 256))
        True

        Raises:
            Exception: whatever the function that was given as ``supports_args`` raises.
        """
        return self._supports_args is None or self._supports_args(*args, **kwargs)

    def func_impl_fn(self, *args: Any, **kwargs: Any) -> Any:
        """Call the implementation without changes of the arguments: one that works in place gets copies of the
        activations.

        >>> dc.ops.silu_and_mul.impls["native"].func_impl_fn(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[2.1932, 7.0464]])

        Raises:
            Exception: whatever the implementation raises.
        """
        if not self.inplace:
            return self.impl_fn(*args, **kwargs)
        fresh = list(args)
        for i in self.op.activation_indices:
            fresh[i] = args[i].clone()
        return self.impl_fn(*fresh, **kwargs)

    def __repr__(self) -> str:
        return f"IrOpImpl({self.op.name!r}, {self.provider!r})"


class IrOp:
    """An op with a native implementation in plain PyTorch, and others that compete with it; :func:`register_op` makes
    it.

    Call it as a function, or as ``torch.ops.dispatch_compile.<name>``. Outside of modes it runs the implementation that
    its priority chooses. Inside a mode that implementation runs compiled, if it is the native one.

    >>> @dc.register_op
    ... def scaled_relu(x: torch.Tensor, scale: float) -> torch.Tensor:
    ...     return torch.relu(x) * scale
    >>> @scaled_relu.register_impl("mykernels", supports_args=lambda x, scale: x.shape[-1] % 8 == 0)
    ... def fast(x: torch.Tensor, scale: float) -> torch.Tensor:
    ...     return x.clamp(min=0).mul_(scale)  # stands for a handwritten kernel
    >>> with scaled_relu.set_priority(["mykernels", "native"]):
    ...     [scaled_relu.dispatch(torch.ones(4, width), 2.0).provider for width in (8, 9)]
    ['mykernels', 'native']
    >>> scaled_relu.unregister()

    Attributes:
        name: the op's name in the namespace ``dispatch_compile``.
        activations: the names of the activation parameters; their dimension 0 is the token dimension.
        activation_indices: their positions among the parameters.
        impls: the implementations by provider; ``"native"`` is always there.
        allow_inplace: whether the op has the overload ``maybe_inplace``.
        torch_op: the op's ``OpOverload``, which leaves its arguments as they are.
        maybe_inplace: with ``allow_inplace=True``, the overload that may overwrite its activations; else None.
        registry: all ops that are registered now, by name.
    """

    registry: ClassVar[dict[str, IrOp]] = {}
    tells_of_changes = True  # by registry.dispatch_changed()

    def __init__(
        self,
        name: str,
        native: Callable[..., Any],
        activations: Sequence[str] | None,
        allow_inplace: bool,
    ) -> None:
        _check_name("op", name)
        check_bools(f"register_op: {name}", allow_inplace=allow_inplace)
        if name in IrOp.registry:
            raise ValueError(f"register_op: op {name!r} is already registered; unregister() it first")
        self.name = name
        self.allow_inplace = allow_inplace
        self._parameters = inspect.signature(native).parameters
        self._schema = _infer_schema(name, native)
        self.automatic = activations is None
        types = {a.name: str(a.type) for a in parse_schema(f"{name}{self._schema}").arguments}
        self.activations = checked_activations(f"register_op: {name}", types, activations)
        self.activation_indices = [i for i, p in enumerate(self._parameters) if p in self.activations]
        self.impls: dict[str, IrOpImpl] = {NATIVE: IrOpImpl(self, NATIVE, native)}
        self._priority: list[IrOpImpl] = []
        self._fake: Callable[..., Any] = native
        self.__doc__ = inspect.getdoc(native)
        self.__name__ = name

        schemas = {name: self._schema}
        if allow_inplace:
            schemas[f"{name}.maybe_inplace"] = self._inplace_schema(native)
        self._library = _library_with(name, schemas)
        self.torch_op = self._implement(name, self._run_functional)
        self.maybe_inplace: MaybeInplace | None = None
        if allow_inplace:
            self.maybe_inplace = MaybeInplace(self, self._implement(f"{name}.maybe_inplace", self._run_maybe_inplace))

    def _implement(self, qualified: str, kernel: Callable[..., Any]) -> OpOverload:
        # CompositeExplicitAutograd keeps the op whole under export and AOTAutograd, and differentiable in eager.
        self._library.impl(qualified, weakly(kernel), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{qualified}", weakly(self._run_fake), lib=self._library)
        packet = getattr(getattr(torch.ops, NAMESPACE), self.name)
        return overload_named(packet, qualified.partition(".")[2] or "default")

    def _inplace_schema(self, native: Callable[..., Any]) -> str:
        returns = self._schema.partition(" -> ")[2]
        if re.findall(r"\w+", returns) != ["Tensor"] * len(self.activations):
            raise ValueError(
                f"register_op: {self.name}: allow_inplace needs one Tensor result for each activation "
                f"{self.activations}, but the schema is {self.name}{self._schema}"
            )
        return str(infer_schema(native, mutates_args=self.activations))

    def _run_functional(self, *args: Any, **kwargs: Any) -> Any:
        return self.dispatch(*args, **kwargs).func_impl_fn(*args, **kwargs)

    def _run_maybe_inplace(self, *args: Any, **kwargs: Any) -> Any:
        return self.dispatch(*args, **kwargs).impl_fn(*args, **kwargs)

    def _run_fake(self, *args: Any, **kwargs: Any) -> Any:
        return self._fake(*args, **kwargs)

    def register_impl(
        self,
        provider: str,
        *,
        supported: bool = True,
        supports_args: Callable[..., bool] | None = None,
        inplace: bool = False,
    ) -> Callable[[Callable[..., Any]], IrOpImpl]:
        """Add another implementation, a handwritten kernel for instance; a decorator for a function of the native's
        signature.

        It runs where :meth:`set_priority` or :meth:`set_default` prefers its provider.

        >>> @dc.register_op
        ... def doubled(x: torch.Tensor) -> torch.Tensor:
        ...     return 2 * x
        >>> @doubled.register_impl("mykernels", supported=torch.cuda.is_available())
        ... def kernel(x: torch.Tensor) -> torch.Tensor:
        ...     return x + x
        >>> sorted(doubled.impls)
        ['mykernels', 'native']
        >>> doubled.unregister()

        Args:
            provider: the implementation's name, unique for the op; ``"native"`` is taken.
            supported: whether this machine can run it (a library or a device is there).
            supports_args: a function of the op's parameters that says whether the implementation takes these arguments.
            inplace: whether it writes its results into its activations; needs ``allow_inplace=True`` on the op.

        Returns:
            The decorator, which returns an :class:`IrOpImpl`.

        Raises:
            ValueError: the provider is taken or its name malformed; ``inplace`` for an op without ``allow_inplace``;
                the signature of the function or of ``supports_args`` differs from that of the native implementation.
            TypeError: an argument of the wrong type; what is decorated is not a plain function.
        """
        _check_name("provider", provider)
        check_bools(f"{self.name}: {provider}", supported=supported, inplace=inplace)
        if provider in self.impls:
            raise ValueError(f"{self.name}: provider {provider!r} is already registered")
        if inplace and not self.allow_inplace:
            raise ValueError(
                f"{self.name}: {provider!r} works in place, but the op does not allow it; "
                f"register the op with allow_inplace=True"
            )
        if supports_args is not None:
            self._check_supports_args(provider, supports_args)

        def register(fn: Callable[..., Any]) -> IrOpImpl:
            check_implementation(fn, f"{self.name}: {provider}")
            schema = _infer_schema(f"{self.name}: {provider}", fn)
            if schema != self._schema:
                raise ValueError(
                    f"{self.name}: the schema of {provider!r} differs from the native one:\n"
                    f"  {provider}: {schema}\n  native: {self._schema}"
                )
            impl = IrOpImpl(self, provider, fn, supported=supported, supports_args=supports_args, inplace=inplace)
            self.impls[provider] = impl
            return impl

        return register

    def _check_supports_args(self, provider: str, supports_args: Callable[..., bool]) -> None:
        if isinstance(supports_args, type) or not callable(supports_args):
            raise TypeError(f"{self.name}: supports_args of {provider!r} must be a function, not {supports_args!r}")

        def described(parameters: Iterable[inspect.Parameter]) -> list[tuple[str, Any, Any]]:
            return [(p.name, p.default, p.kind) for p in parameters]

        given = inspect.signature(supports_args).parameters.values()
        if described(given) != described(self._parameters.values()):
            raise ValueError(
                f"{self.name}: supports_args of {provider!r} must have the native implementation's parameters:\n"
                f"  supports_args: ({', '.join(p.name for p in given)})\n"
                f"  native: ({', '.join(self._parameters)})\nwith the same defaults"
            )

    def register_fake(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Replace what runs on fake tensors, where the native implementation is too slow for it; a decorator.

        >>> @dc.register_op
        ... def doubled(x: torch.Tensor) -> torch.Tensor:
        ...     return 2 * x
        >>> @doubled.register_fake
        ... def _(x):
        ...     return torch.empty_like(x)
        >>> doubled.unregister()

        Args:
            fn: computes results of the right shapes, dtypes and devices from fake arguments.

        Returns:
            ``fn``.

        Raises:
            TypeError: ``fn`` is not a function, or is one whose body runs after its call returned.
        """
        check_plain(fn, f"{self.name}: register_fake")
        self._fake = fn
        return fn

    def dispatch(self, *args: Any, **kwargs: Any) -> IrOpImpl:
        """The implementation that a call with these arguments would run.

        It is the first one in the priority that supports the arguments, or else the native one.

        >>> dc.ops.silu_and_mul.dispatch(torch.ones(8, 256))
        IrOpImpl('silu_and_mul', 'native')

        Raises:
            Exception: whatever a ``supports_args`` raises.
        """
        for impl in self._priority:
            if impl.supports_args(*args, **kwargs):
                return impl
        return self.impls[NATIVE]

    def get_priority(self) -> list[str]:
        """The providers that dispatch tries, in order; empty if no priority is set.

        >>> dc.ops.rms_norm.get_priority()
        []
        """
        return [impl.provider for impl in self._priority]

    def set_default(self, priority: Sequence[str]) -> None:
        """Set the priority from now on, for all threads, where :meth:`set_priority` sets it for a block.

        >>> dc.ops.rms_norm.set_default(["native"])
        >>> dc.ops.rms_norm.get_priority()
        ['native']
        >>> dc.ops.rms_norm.set_default([])

        Args:
            priority: providers, the preferred one first. Those that this machine cannot run are left out.

        Raises:
            ValueError: a provider that is not registered.
            TypeError: ``priority`` is not a list of names.
        """
        self._prefer(self._resolved(priority))

    @contextlib.contextmanager
    def set_priority(self, priority: Sequence[str]) -> Iterator[None]:
        """Set which implementations are preferred, inside a ``with`` block, for all threads.

        >>> with dc.ops.rms_norm.set_priority(["native"]):
        ...     dc.ops.rms_norm.get_priority()
        ['native']
        >>> with dc.ops.rms_norm.set_priority(["vendor"]):
        ...     pass
        Traceback (most recent call last):
        ValueError: rms_norm: no provider ['vendor']; registered are ['native']

        Args:
            priority: providers, the preferred one first. Those that this machine cannot run are left out. The native
                implementation runs where no other supports the arguments.

        Raises:
            ValueError: a provider that is not registered.
            TypeError: ``priority`` is not a list of names.
        """
        resolved = self._resolved(priority)
        previous = self._priority
        self._prefer(resolved)
        try:
            yield
        finally:
            self._prefer(previous)

    def _prefer(self, priority: list[IrOpImpl]) -> None:
        self._priority = priority
        registry.dispatch_changed()

    def _resolved(self, priority: Sequence[str]) -> list[IrOpImpl]:
        priority = checked_names(self.name, "priority", priority)
        unknown = [provider for provider in priority if provider not in self.impls]
        if unknown:
            raise ValueError(f"{self.name}: no provider {unknown}; registered are {list(self.impls)}")
        return [impl for impl in map(self.impls.__getitem__, priority) if impl.supported]

    def supported_providers(self) -> list[str]:
        """The providers whose implementation this machine can run.

        >>> dc.ops.rms_norm.supported_providers()
        ['native']
        """
        return [impl.provider for impl in self.impls.values() if impl.supported]

    def unregister(self) -> None:
        """Take the op out of torch and out of the registry, at the end of a test for instance. Harmless when repeated.

        The code that was compiled for it can then be freed.

        >>> @dc.register_op
        ... def doubled(x: torch.Tensor) -> torch.Tensor:
        ...     return 2 * x
        >>> doubled.unregister()
        >>> "doubled" in dc.IrOp.registry
        False
        """
        if IrOp.registry.get(self.name) is self:
            del IrOp.registry[self.name]
            self._library._destroy()
            registry.changed()  # last, for a tracing mode would take an op that still exists for an opaque one

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.torch_op(*args, **kwargs)

    def __copy__(self) -> IrOp:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> IrOp:
        """An op is one, as a function is: a module that holds it can be copied."""
        return self

    def __repr__(self) -> str:
        return f"IrOp({NAMESPACE}::{self.name}{self._schema})"


class MaybeInplace:
    """The overload of an op that may overwrite its activations: they are dead after the call."""

    def __init__(self, op: IrOp, torch_op: OpOverload) -> None:
        self.op = op
        self.torch_op = torch_op

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.torch_op(*args, **kwargs)


@overload
def register_op(fn: Callable[..., Any]) -> IrOp: ...


@overload
def register_op(
    fn: None = None,
    *,
    name: str | None = None,
    activations: Sequence[str] | None = None,
    allow_inplace: bool = False,
) -> Callable[[Callable[..., Any]], IrOp]: ...


def register_op(
    fn: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    activations: Sequence[str] | None = None,
    allow_inplace: bool = False,
) -> IrOp | Callable[[Callable[..., Any]], IrOp]:
    """Make an IR op of a function of plain PyTorch; a decorator.

    Use it for an op that others may give faster implementations. For a function that stays a function, use
    :func:`native`. The surface is that of ``vllm.ir.register_op``.

    >>> @dc.register_op
    ... def scaled_relu(x: torch.Tensor, scale: float) -> torch.Tensor:
    ...     return torch.relu(x) * scale
    >>> with dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), trace=True) as mode:
    ...     y = scaled_relu(torch.ones(8, 64), 2.0)
    >>> print(mode.trace)
    dispatch_compile::scaled_relu(t: f32[8, 64], 2.0)  ->  t: f32[8, 64]  # compiled native, new: [s0, 64]
    >>> scaled_relu.unregister()

    Args:
        fn: the native implementation: a function of its arguments alone, with type hints. What it reads besides its
            arguments is fixed at the first call.
        name: the op's name; by default the function's.
        activations: the parameters whose dimension 0 is the token dimension; by default those that start with ``x``.
        allow_inplace: also make the overload ``maybe_inplace``, which may overwrite the activations.

    Returns:
        The :class:`IrOp`; without ``fn``, the decorator.

    Raises:
        ValueError: the name is taken or malformed; the signature has keyword-only parameters, or torch can make no
            schema of it; an activation is not a parameter, or not a tensor; ``allow_inplace`` does not fit the results;
            an op of this name was unregistered that had ``allow_inplace`` and another schema.
        TypeError: ``fn`` is not a plain function, but a class, a method, a ``partial`` or compiled, say; another
            argument of the wrong type.
    """

    def decorate(native: Callable[..., Any]) -> IrOp:
        check_implementation(native, "register_op")
        op = IrOp(native.__name__ if name is None else name, native, activations, allow_inplace)
        IrOp.registry[op.name] = op
        registry.changed()
        return op

    return decorate if fn is None else decorate(fn)


@dataclass(frozen=True)
class _Definitions:
    schemas: dict[str, str]  # by name, or "name.overload"
    library: Library


# Ops with two overloads stay defined when they are unregistered. torch's JIT tells operators apart by the types and
# names of their parameters alone, in which the overloads do not differ, so when both go it forgets one and keeps a
# pointer to the other: looking up an op by the same name then crashes (seen on 2.11 to 2.15).
_kept_definitions: dict[str, _Definitions] = {}


def _library_with(name: str, schemas: dict[str, str]) -> Library:
    """A library to put the kernels of an op in, which is defined now. The definition goes with it, if it can.

    Raises:
        ValueError: the op is defined for good, with another schema.
    """
    library = Library(NAMESPACE, "FRAGMENT")
    kept = _kept_definitions.get(name)
    if kept is None:
        for qualified, schema in schemas.items():
            library.define(qualified + schema)
        if len(schemas) == 1:
            return library
        _kept_definitions[name] = _Definitions(schemas, library)
        return Library(NAMESPACE, "FRAGMENT")
    for qualified, schema in schemas.items():
        if kept.schemas[qualified] != schema:
            raise ValueError(
                f"register_op: {name}: an op of this name was registered with allow_inplace=True and unregistered, and "
                f"torch cannot change its schema; use another name, or start the process anew\n"
                f"  before: {qualified}{kept.schemas[qualified]}\n  now: {qualified}{schema}"
            )
    return library


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` without a hold on its object: torch keeps the kernels of destroyed libraries for ever."""
    reference = weakref.WeakMethod(method)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        bound = reference()
        assert bound is not None, "called after unregister()"
        return bound(*args, **kwargs)

    return kernel


def _check_name(what: str, name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{what} name must be a string, not {name!r}")
    if not _NAME.match(name):
        raise ValueError(f"{what} name {name!r}: use lower-case letters, digits and underscores")


def _infer_schema(name: str, fn: Callable[..., Any]) -> str:
    for parameter in inspect.signature(fn).parameters.values():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise ValueError(
                f"{name}: parameter {parameter.name!r} is {parameter.kind.description}; "
                f"an IR op takes parameters that may be given by position"
            )
    try:
        return str(infer_schema(fn, mutates_args=[]))
    except ValueError as error:
        raise ValueError(f"{name}: no torch schema can be made of the signature: {error}") from error


registry.add_source(lambda: IrOp.registry.values())
