"""What an IR op and its implementations are to the rest of the package: ``vllm.ir``'s, the embedded IR's, natives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from .._torch.dispatch import OpOverload

NATIVE = "native"


class Impl(Protocol):
    """One implementation of an op, as the interposer sees it (``vllm.ir``'s ``IrOpImpl`` is one)."""

    provider: str

    def func_impl_fn(self, *args: Any, **kwargs: Any) -> Any:
        """The implementation with functional semantics: no argument is changed."""


class Op(Protocol):
    """An IR op, as the interposer sees it (``vllm.ir``'s ``IrOp`` is one); or a native.

    An op that is called through torch has its ``OpOverload`` as ``torch_op``, and may have one that works in place as
    ``maybe_inplace.torch_op``; see :func:`overloads`.
    """

    activations: list[str]

    def dispatch(self, *args: Any, **kwargs: Any) -> Impl:
        """The implementation that priority and ``supports_args`` choose for these arguments."""


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


def implementations_tried(op: Any) -> list[Any]:
    """The implementations that an op's dispatch tries, in order, up to one that takes any arguments."""
    if not hasattr(op, "get_priority"):
        return [op.dispatch()]
    tried = []
    for provider in op.get_priority():
        impl = op.impls[provider]
        tried.append(impl)
        if impl.supports_all_args:
            return tried
    return [*tried, op.impls[NATIVE]]


def supports_args_of(impl: Any) -> Callable[..., Any] | None:
    """The function that says which arguments an implementation takes; None if it takes any."""
    return None if getattr(impl, "supports_all_args", True) else impl._supports_args
