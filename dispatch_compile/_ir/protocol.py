"""What an IR op and its implementations are to the rest of the package: ``vllm.ir``'s, the embedded IR's, natives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeGuard

from .._torch.dispatch import OpOverload

NATIVE = "native"


class Impl(Protocol):
    """One implementation of an op, as the interposer sees it (``vllm.ir``'s ``IrOpImpl`` is one)."""

    provider: str

    @property
    def impl_fn(self) -> Callable[..., Any]:
        """The function that was given as the implementation."""

    def func_impl_fn(self, *args: Any, **kwargs: Any) -> Any:
        """The implementation with functional semantics: no argument is changed."""


class Op(Protocol):
    """An IR op, as the interposer sees it (``vllm.ir``'s ``IrOp`` is one); or a native.

    An op that is called through torch is a :class:`TorchOp`, one with several implementations a :class:`Prioritized`.
    """

    activations: list[str]

    def dispatch(self, *args: Any, **kwargs: Any) -> Impl:
        """The implementation that priority and ``supports_args`` choose for these arguments."""


class WithOverload(Protocol):
    """What stands for an ``OpOverload``."""

    @property
    def torch_op(self) -> OpOverload:
        """The overload that a call of it is a call of."""


class TorchOp(Op, WithOverload, Protocol):
    """An op that is called through torch.

    It may have another overload, which works in place, as ``maybe_inplace.torch_op``; see :func:`overloads`.
    """


class PrioritizedImpl(Impl, Protocol):
    """One of the implementations that an op's dispatch chooses from."""

    @property
    def supported(self) -> bool:
        """Whether this machine can run it at all."""

    @property
    def supports_all_args(self) -> bool:
        """Whether it takes any arguments; else ``_supports_args`` says which."""

    @property
    def _supports_args(self) -> Callable[..., Any] | None: ...


class Prioritized(Op, Protocol):
    """An op whose dispatch goes by a priority."""

    @property
    def impls(self) -> Mapping[str, PrioritizedImpl]:
        """The implementations, by provider."""

    def get_priority(self) -> list[str]:
        """The providers that dispatch tries, in order."""


def is_torch_op(op: Op) -> TypeGuard[TorchOp]:
    return hasattr(op, "torch_op")


def is_prioritized(op: Op) -> TypeGuard[Prioritized]:
    return hasattr(op, "get_priority")


def eager_provider(op: Op, impl: Impl) -> str:
    """The provider of what runs when the implementation chosen for a call is not compiled."""
    return getattr(op, "eager_provider", impl.provider)


KERNEL = "kernel"  # what stands for a provider where an op of another library runs its own kernel


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


def implementations_tried(op: Op) -> list[Impl]:
    """The implementations that an op's dispatch tries, in order, up to one that takes any arguments."""
    if not is_prioritized(op):
        return [op.dispatch()]
    tried: list[Impl] = []
    for provider in op.get_priority():
        impl = op.impls[provider]
        tried.append(impl)
        if impl.supports_all_args:
            return tried
    return [*tried, op.impls[NATIVE]]


def supports_args_of(impl: Impl) -> Callable[..., Any] | None:
    """The function that says which arguments an implementation takes; None if it takes any."""
    return impl._supports_args if _takes_only_some(impl) else None


def _takes_only_some(impl: Impl) -> TypeGuard[PrioritizedImpl]:
    return not getattr(impl, "supports_all_args", True)
