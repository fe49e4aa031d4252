"""What a mode would do with a call, told without doing it.

The call is made, but only as far as the place where calls are caught. So the dispatcher has read the arguments, and the
thread's state is that of a call. There the call is explained in place of being run, and an exception ends it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any, NoReturn, cast

from torch import fx

from .._basics.summary import summary_of, text_of
from .._cache import background
from .._cache.making import Made, Maker
from .._cache.table import Table
from .._compile.capture import Captured, capture
from .._compile.config import BACKGROUND
from .._compile.outcome import IN_BACKGROUND, Aside, Eager, Failed
from .._compile.specialization import Specialization
from .._dispatch.active import EVERY_OP, enter, suspended
from .._ir import registry
from .._ir.protocol import KERNEL, Impl, Op, eager_provider, is_prioritized, overloads
from .._specialize.arguments import NOTHING_LEARNED, Arguments, flatten
from .._specialize.aside import why_own_kind
from .._specialize.callee import full_name
from .._specialize.difference import argument_components, in_names, state_components
from .._specialize.stand_ins import Relearn
from .._torch.dispatch import OpOverload, decomposes, without_modes, without_version_counting
from .._trace.event import ASIDE, COMPILED, EAGER
from .decision import Load, Make, Outcome, Read, Run, decide
from .route import Route

if TYPE_CHECKING:
    from .._mode import DispatchCompileMode
    from .._native import Native


@dataclass(frozen=True)
class Explanation:
    """What a mode would do with a call, and why; :meth:`DispatchCompileMode.explain` returns one.

    Print it, or read its attributes:

    >>> mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"))
    >>> explanation = mode.explain(dc.ops.silu_and_mul, torch.ones(8, 256))
    >>> print(explanation)
    dispatch_compile::silu_and_mul(t: f32[8, 256])
    would be compiled first, then run compiled
    implementation: native, since no priority is set
    specialization: [s0, 256]
      x: f32, shape [s0, 256], stride [256, 1], device cpu, requires_grad False, is_inference() False
      inference mode off, grad mode on, and the rest of torch's global state
      sizes: 2 <= x.size(0)
    guard:
      def call(args, kwargs):
          ...
    graph:
      def forward(self, x_size_0, x):
          ...
    generated code: none before it is compiled
    >>> explanation.arguments["x's shape"], explanation.size_guard
    ('[s0, 256]', '2 <= x.size(0)')

    The attributes from ``specialization`` on are empty or None if the call would not run compiled. The generated code
    is None until it is compiled.

    Attributes:
        op: ``"ns::name.overload"``.
        inputs: the arguments as the op would get them, as in a trace: ``t: bf16[8, 2048], 1e-06``.
        provider: whose implementation would run: the one that the op's dispatch chooses, or ``"kernel"`` for the own
            kernel of an op of another library, as in :class:`TraceEvent`.
        priority: the providers that dispatch tries, in this order; empty if no priority is set.
        skipped: by provider, why not: for those tried before the chosen one, and those that this machine cannot run.
        action: ``"compiled"``, ``"eager"`` or ``"aside"``, as in :class:`TraceEvent`.
        reason: why it would not run compiled; None if it would.
        raises: whether the call would raise a :class:`CompileError` with the reason.
        specialization: the sizes of the compiled code's tensor arguments, ``[s0, 2048], [2048]``.
        new: whether the call would first compile this specialization.
        loaded: whether the call would first load this specialization, which was saved.
        difference: how a new specialization differs from the nearest existing one; None if it is the first.
        fuses: the IR ops that the implementation calls, and that are part of the graph.
        not_fused: the other IR ops that it calls, and why each is not part of the graph.
        arguments: what the code assumes of the arguments, by name: ``{"x": "bf16", "x's shape": "[s0, 2048]", ...}``.
        state: what it assumes of torch's state, by name: ``{"grad mode": "on", ...}``.
        size_guard: a condition on the dynamic sizes, ``2 <= x.size(0)``; None if there is none. Compiling may add to
            it.
        guard: Python source of the check that lets later calls run the code at once, for arguments ``a0``, ``a1``, ...
        graph: the ATen graph that is compiled, as Python source.
        generated_code: the text of Inductor's code.
        generated_code_path: the file that Inductor wrote it to.
    """

    op: str
    inputs: str
    provider: str
    priority: tuple[str, ...]
    skipped: Mapping[str, str]
    action: str = ASIDE
    reason: str | None = None
    raises: bool = False
    specialization: str | None = None
    new: bool = False
    loaded: bool = False
    difference: str | None = None
    fuses: tuple[str, ...] = ()
    not_fused: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, str] = field(default_factory=dict)
    state: Mapping[str, str] = field(default_factory=dict)
    size_guard: str | None = None
    guard: str | None = None
    graph: str | None = None
    generated_code: str | None = None
    generated_code_path: str | None = None

    def text(self, *, code: bool = False) -> str:
        """The explanation as text for people; ``str()`` gives the same without the code.

        >>> mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"))
        >>> print(mode.explain(dc.ops.silu_and_mul, torch.ones(8, 256)).text(code=True))
        dispatch_compile::silu_and_mul(t: f32[8, 256])
        would be compiled first, then run compiled
        ...

        Args:
            code: True adds the text of the generated code, if it is compiled.
        """
        return "\n".join(self._lines(code))

    def __str__(self) -> str:
        return self.text()

    def _lines(self, code: bool) -> Iterator[str]:
        yield f"{self.op.removesuffix('.default')}({self.inputs})"
        yield f"would {self._decision()}"
        yield f"implementation: {self.provider}, {self._why_chosen()}"
        yield from (f"  not {provider}: {why}" for provider, why in self.skipped.items())
        if self.action != COMPILED:
            return
        yield f"specialization: {self.specialization}{f'; {self.difference}' if self.difference else ''}"
        yield from (f"  {line}" for line in self._baked_in())
        yield f"  sizes: {self.size_guard or 'any'}"
        if self.fuses:
            yield f"fuses: {', '.join(self.fuses)}"
        yield from (f"does not fuse {op}: {why}" for op, why in self.not_fused.items())
        yield from _section("guard", self.guard)
        yield from _section("graph", self.graph)
        yield f"generated code: {self._code_place()}"
        if code and self.generated_code is not None:
            yield self.generated_code

    def _decision(self) -> str:
        if self.action == COMPILED:
            if self.new:
                return "be compiled first, then run compiled"
            return f"run compiled; the code is {'saved, and loaded first' if self.loaded else 'there'}"
        if self.raises:
            return f"raise CompileError: {self.reason}"
        return f"{'run eagerly' if self.action == EAGER else 'step aside'}: {self.reason}"

    def _why_chosen(self) -> str:
        if self.provider == KERNEL and not self.priority:
            return "the op's own"
        if not self.priority:
            return "since no priority is set"
        tried = f"in the priority [{', '.join(self.priority)}]"
        if self.provider not in self.priority:
            return f"since none {tried} supports the arguments"
        return f"the first {tried} that supports the arguments"

    def _baked_in(self) -> Iterator[str]:
        """The key, a line for each argument."""
        lines: dict[str, str] = {}
        for name, text in self.arguments.items():
            argument, _, aspect = name.partition("'s ")
            lines[argument] = f"{lines[argument]}, {aspect} {text}" if aspect else f"{argument}: {text}"
        yield from lines.values()
        told = ", ".join(f"{name} {self.state[name]}" for name in ("inference mode", "grad mode"))
        yield f"{told}, and the rest of torch's global state"

    def _code_place(self) -> str:
        if self.new:
            return "none before it is compiled"
        return self.generated_code_path or "none"


def _section(title: str, source: str | None) -> Iterator[str]:
    if source is not None:
        yield f"{title}:"
        yield from (wrapped for line in source.splitlines() for wrapped in _CODE.wrap(line))


_CODE = TextWrapper(
    width=120, initial_indent="  ", subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False
)


def explanation_of(
    mode: DispatchCompileMode, overload: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Explanation:
    """What a mode, which knows of the latest ops, would do with a call made now on this thread.

    Raises:
        ValueError: ``overload`` is no IR op's.
        Exception: whatever the dispatcher raises on malformed arguments, or the op's own dispatch.
    """
    route = mode.routes.get(overload.name())
    op = _op_of(overload) if route is None else route.op()
    if op is None:
        raise ValueError(
            f"explain: {overload} is no IR op; give it a reference implementation with dispatch_compile.register_native"
        )
    reason = "the mode's ops= leaves it out" if route is None else _why_not_caught(overload, route, args, kwargs)
    if route is not None and reason is None:
        explanation = _explained_where_caught(mode, _Asking(op, route), overload, args, kwargs)
        if explanation is not None:
            return explanation
        reason = "a kernel of its own deals with it before it gets to where calls are caught"
    return _stepped_aside(op, op.dispatch(*args, **kwargs), full_name(overload), args, kwargs, reason)


def explanation_of_function(
    mode: DispatchCompileMode, native: Native, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Explanation:
    """What a mode would do with a call of a function made now on this thread.

    Raises:
        TypeError: the function does not take these arguments.
    """
    native.signature.bind(*args, **kwargs)
    route = mode.route_of(native)
    if route is None:
        reason = "the mode's ops= leaves it out"
        return _stepped_aside(native, native.impl, native.name, args, kwargs, reason)
    with suspended():
        return _explained(native, route, (*native.outside(), *args), kwargs)


def _explained_where_caught(
    mode: DispatchCompileMode,
    asking: _Asking,
    overload: OpOverload,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Explanation | None:
    on_stack = mode.on_torchs_stack() if mode.interception == EVERY_OP else nullcontext()
    try:
        with suspended(), without_modes(), on_stack, without_version_counting():
            enter(cast("DispatchCompileMode", _AskingMode({overload.name(): asking})))
            overload(*args, **kwargs)
    except _Decided:
        pass
    return asking.explanation


def _op_of(overload: OpOverload) -> Op | None:
    for op in registry.known_ops():
        if any(known.name() == overload.name() for known in overloads(op)):
            return op
    return None


def _why_not_caught(overload: OpOverload, route: Route, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Why something other than the op would run before the call could be caught; None if nothing would."""
    if decomposes(overload):
        return "it decomposes before it gets to where calls are caught"
    known = args[: len(route.callee.parameters.names)]  # of more, the dispatcher complains
    for leaf in flatten(route.callee.parameters, known, kwargs).tensors:
        why = why_own_kind(leaf.value)
        if why is not None:
            return f"{leaf.name} {why}"
    return None


class _Decided(BaseException):
    """Ends the call. No Exception, lest code on the way takes it for a failure that it can deal with."""


@dataclass
class _Asking:
    """Stands where a mode's route is, and keeps what the call that comes there would come to."""

    asked_of: Op
    route: Route
    explanation: Explanation | None = None
    last: tuple[None, None] = (None, None)  # no short cut

    def op(self) -> Op:
        return self.asked_of

    def run(self, keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any], event: object) -> NoReturn:
        with suspended():
            self.explanation = _explained(self.asked_of, self.route, args, kwargs)
        raise _Decided


@dataclass
class _AskingMode:
    """As much of a mode as is looked at while the call is on its way."""

    routes: dict[str, _Asking]
    trace: None = None


def _explained(op: Op, route: Route, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Explanation:
    """The explanation of a call that came to where calls are caught."""
    maker, callee = route.maker, route.callee
    impl = op.dispatch(*args, **kwargs)
    aside = _stepped_aside(op, impl, callee.full_name, args[callee.parameters.hidden :], kwargs, None)
    table = route.cache.existing_table(impl, route.config) or Table()
    more, why_new = NOTHING_LEARNED, None
    while True:
        decision = decide(maker, impl, table, args, kwargs, more)
        read = decision.read
        outcome: Outcome | Specialization = decision.outcome
        if read is not None:
            if isinstance(outcome, Run | Load):
                found = _compiled(aside, impl, maker, read.arguments, outcome.specialization)
                return replace(found, loaded=isinstance(outcome, Load))
            if isinstance(outcome, Make):
                try:
                    outcome = _foreseen(maker, impl, table, read)
                except Relearn as again:
                    more |= again.more
                    why_new = again.why or why_new
                    continue
            if isinstance(outcome, Specialization):
                difference = read.why_new or why_new or table.difference(outcome.components)
                found = _compiled(aside, impl, maker, read.arguments, outcome)
                return replace(found, new=True, difference=difference)
        if isinstance(outcome, Aside):
            return replace(aside, reason=outcome.reason)
        assert isinstance(outcome, Eager | Failed), "what has code has been read"
        return replace(aside, action=EAGER, reason=outcome.reason, raises=outcome.raises)


def _foreseen(maker: Maker, impl: Impl, table: Table, read: Read) -> Made:
    if maker.config.on_new != BACKGROUND:
        return maker.foresee(impl, read.arguments)
    failed: Made | None = background.failure(table, read.key)
    return failed or Eager(IN_BACKGROUND)


def _compiled(
    aside: Explanation, impl: Impl, maker: Maker, arguments: Arguments, specialization: Specialization
) -> Explanation:
    code = specialization.code
    return replace(
        aside,
        action=COMPILED,
        provider=impl.provider,
        specialization=code.symbolic_shapes,
        fuses=tuple(code.composition.fused),
        not_fused=code.composition.left,
        arguments=argument_components(arguments),
        state=state_components(),
        size_guard=specialization.guard,
        guard=specialization.guarded_call(arguments, of_function=maker.callee.is_function).__doc__,
        graph=_graph_in_names(capture(impl, maker.callee.parameters, arguments, maker.config)),
        generated_code=code.source,
        generated_code_path=code.path,
    )


def _stepped_aside(
    op: Op, impl: Impl, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], reason: str | None
) -> Explanation:
    """The explanation of a call that steps aside."""
    inputs = [text_of(summary_of(value)) for value in args]
    inputs += [f"{name}={text_of(summary_of(value))}" for name, value in kwargs.items()]
    # An op of another library with a reference implementation has that one alone, and no priority.
    priority, impls = (tuple(op.get_priority()), op.impls) if is_prioritized(op) else ((), {})
    before = priority[: priority.index(impl.provider)] if impl.provider in priority else priority
    skipped = dict.fromkeys(before, "its supports_args says no")
    if priority:
        skipped.update({name: "not supported on this machine" for name, other in impls.items() if not other.supported})
    return Explanation(name, ", ".join(inputs), eager_provider(op, impl), priority, skipped, reason=reason)


def _graph_in_names(captured: Captured) -> str:
    """The graph as source, its inputs with the parameters' names: ``x_size_0, x, weight`` for ``x.size(0)``, ..."""
    sources = [in_names(source, captured.arguments) or source for source in captured.input_sources]
    names = (re.sub(r"\W+", "_", source).strip("_") for source in sources)
    graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in captured.graph.graph.nodes:
        is_input = node.op == "placeholder"
        nodes[node] = graph.placeholder(next(names)) if is_input else graph.node_copy(node, nodes.__getitem__)
    code = str(fx.GraphModule(captured.graph, graph).code).strip()
    return re.sub(r";  [\w =]+ = None$", "", code, flags=re.MULTILINE)  # where each value is last used
