"""Calls of IR ops inside an implementation: those that the configuration would compile become part of its graph, so
that the compiler fuses them, and the rest stay calls.

Which implementation an op's dispatch chooses is asked while the implementation is captured. What that goes by is
remembered, and compiled code runs only where it is still so.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._ir import registry
from .._ir.protocol import implementations_tried, overloads, supports_args_of
from .._specialize.key import Fact
from .._torch.dispatch import OpOverload, QuietMode
from .config import NATIVE, CompileConfig, not_in_providers
from .predicates import Reads, Unclear, reads_of

if TYPE_CHECKING:
    from .._ir.protocol import Impl, TorchOp

_OWN_NAMESPACE = "dispatch_compile::"


@dataclass(frozen=True)
class _Dispatch:
    """What an op's dispatch goes by, as it was: the implementations that it tries, and what their ``supports_args``
    read. It keeps none of them alive."""

    name: str  # ns::name
    op: weakref.ref[TorchOp]
    tried: tuple[weakref.ref[Impl], ...]
    reads: tuple[Reads, ...]

    @staticmethod
    def of(op: TorchOp) -> _Dispatch:
        """What it goes by now.

        Raises:
            Unclear: it is unknown.
        """
        tried = implementations_tried(op)
        reads = []
        for impl in tried:
            supports_args = supports_args_of(impl)
            if supports_args is not None:
                try:
                    reads.append(reads_of(supports_args))
                except Unclear as reason:
                    raise Unclear(f"supports_args of {impl.provider!r} {reason}") from None
        return _Dispatch(op.torch_op._schema.name, weakref.ref(op), tuple(map(weakref.ref, tried)), tuple(reads))

    @property
    def is_registered(self) -> bool:
        """Whether calls of the op are still calls of this one."""
        op = self.op()
        return op is not None and op in registry.torch_ops()

    def tries_the_same(self) -> bool:
        """Whether it would try the same implementations now."""
        op = self.op()
        if op is None:
            return False
        tried = implementations_tried(op)
        return len(tried) == len(self.tried) and all(map(_is_alive_as, self.tried, tried))


def _is_alive_as(reference: weakref.ref[Impl], value: Impl) -> bool:
    return reference() is value


class Composition:
    """What became of the calls of IR ops in a captured implementation.

    Attributes:
        fused: ops whose implementations are part of the graph, in the order of their first calls, with the providers.
        left: why not, by name, of those that stay calls.
        asked: the ops, as ``ns::name``, by whose dispatch it was decided.
    """

    def __init__(
        self, fused: Mapping[str, str], left: Mapping[str, str], dispatches: Sequence[_Dispatch], generation: int
    ) -> None:
        self.fused = fused
        self.left = left
        self.asked = tuple(dispatch.name for dispatch in dispatches)
        self._dispatches = tuple(dispatches)
        self._to_be_looked_at = tuple(d for d in dispatches if not getattr(d.op(), "tells_of_changes", False))
        self._reads = tuple(reads for dispatch in dispatches for reads in dispatch.reads)
        self._told = generation, True  # whether, by this generation, it is the same of those that tell of changes

    def components(self) -> dict[str, Fact]:
        """The same, for people, by name."""
        became = {name: f"fused ({provider})" for name, provider in self.fused.items()}
        became.update(dict.fromkeys(self.left, "not fused"))
        return {f"{name}'s call": Fact("call", text) for name, text in became.items()}

    def holds(self) -> bool:
        """Whether the same would become of them now; called with every call of the compiled code."""
        generation = registry.generation
        looked_at, same = self._told
        if looked_at != generation:
            same = all(dispatch.is_registered and dispatch.tries_the_same() for dispatch in self._dispatches)
            self._told = generation, same
        return (
            same
            and all(dispatch.tries_the_same() for dispatch in self._to_be_looked_at)
            and all(reads.unchanged() for reads in self._reads)
        )

    @staticmethod
    def again(fused: Mapping[str, str], asked: Iterable[str]) -> Composition:
        """What was decided in another process, where dispatch went by the same as here now.

        Raises:
            Unclear: there is no such op here, or it is unknown what its dispatch depends on.
        """
        generation = registry.generation
        known = {op.torch_op._schema.name: op for op in registry.torch_ops()}
        missing = [name for name in asked if name not in known]
        if missing:
            raise Unclear(f"there is no IR op {missing[0]}")
        return Composition(fused, {}, [_Dispatch.of(known[name]) for name in asked], generation)


NO_CALLS = Composition({}, {}, (), 0)


class Inlining(QuietMode):
    """Around an implementation while it is captured: runs, in place of some calls of IR ops, what those would run."""

    supports_higher_order_operators = True  # it hands them on

    def __init__(self, impl: Impl, config: CompileConfig) -> None:
        super().__init__()
        self._config = config
        # By name: for an op there may be several OpOverload objects, as torch forgets them and makes new ones.
        self._ops = {overload.name(): (op, overload) for op in registry.torch_ops() for overload in overloads(op)}
        self._generation = registry.generation
        self._within = [impl]  # the implementations that are being captured, outermost first
        self._dispatches: dict[int, _Dispatch] = {}
        self._fused: dict[str, str] = {}
        self._left: dict[str, str] = {}
        self._natives: set[str] = set()

    @property
    def fuses(self) -> bool:
        """Whether any op is inlined so far."""
        return len(self._fused) > len(self._natives)

    def note_native(self, name: str) -> None:
        """A native was called; it inlines by itself."""
        self._natives.add(name)
        self._fused.setdefault(name, NATIVE)

    def composition(self) -> Composition:
        """What was decided."""
        return Composition(self._fused, self._left, list(self._dispatches.values()), self._generation)

    def given_up(self, reason: object) -> Composition:
        """What is decided where the graph with the inlined calls cannot be used, and the calls stay."""
        ops = [name for name in self._fused if name not in self._natives]
        left = {**dict.fromkeys(ops, f"the implementation cannot be captured with it: {reason}"), **self._left}
        return Composition(
            dict.fromkeys(self._natives, NATIVE), left, list(self._dispatches.values()), self._generation
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload) or func.name() not in self._ops:
            return func(*args, **kwargs)
        op, overload = self._ops[func.name()]
        name = overload._schema.name.removeprefix(_OWN_NAMESPACE)
        try:
            impl = self._chosen(op, overload, args, kwargs)
        except Unclear as reason:
            self._left.setdefault(name, str(reason))
            return func(*args, **kwargs)
        self._fused.setdefault(name, impl.provider)
        self._within.append(impl)
        try:
            with self:
                return impl.func_impl_fn(*args, **kwargs)
        finally:
            self._within.pop()

    def _chosen(self, op: TorchOp, overload: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Impl:
        """The implementation to inline.

        Raises:
            Unclear: the call stays a call; the message says why.
        """
        dispatch = self._dispatches.get(id(op))
        if dispatch is None:
            dispatch = self._dispatches[id(op)] = _Dispatch.of(op)
        try:
            impl = op.dispatch(*args, **kwargs)
        except Exception as error:
            raise Unclear(f"its dispatch raises {type(error).__name__}") from error
        if not any(impl is tried() for tried in dispatch.tried):
            raise Unclear(f"its dispatch chooses {impl.provider!r}, which its priority does not lead to")
        if impl.provider not in self._config.providers:
            raise Unclear(not_in_providers(impl.provider, self._config))
        if any(impl is outer for outer in self._within):
            raise Unclear("it calls itself")
        if overload._schema.is_mutable and (overload is op.torch_op or getattr(impl, "inplace", False)):
            raise Unclear("it may change its arguments")
        return impl
