"""What a trace records of a call."""

from __future__ import annotations

from dataclasses import dataclass

from .._basics.summary import Summary, text_of
from .._compile.inlining import Composition

COMPILED = "compiled"
EAGER = "eager"
ASIDE = "aside"


@dataclass(eq=False)
class OpCall:
    """A call of an op in a :class:`Trace`, as :attr:`Trace.calls` lists them; those of IR ops are :class:`TraceEvent`.

    >>> trace = dc.Trace(all_ops=True)
    >>> with dc.DispatchCompileMode(trace=trace):
    ...     y = torch.ones(8, 64).mul(2)
    >>> call = trace.calls[-1]
    >>> call.op, call.arguments, call.result
    ('aten::mul.Tensor', 't: f32[8, 64], 2', 't: f32[8, 64]')

    Attributes:
        op: ``"ns::name.overload"``.
        inputs: the arguments, each with its name if it was given by keyword.
        depth: how many calls of the trace it is nested in.
        thread: the calling thread's number, in the order in which the trace met them.
        start: when it began, in nanoseconds of ``time.perf_counter_ns``.
        nanoseconds: how long it took on the host; None before it ends.
        output: the result; None if the call raised.
        stack: the call site and its callers, innermost last, if the trace records stacks.
    """

    op: str
    inputs: tuple[tuple[str | None, Summary], ...]
    depth: int = 0
    thread: int = 0
    start: int = 0
    nanoseconds: int | None = None
    output: Summary | None = None
    stack: tuple[str, ...] = ()

    @property
    def arguments(self) -> str:
        """The arguments as text, separated by commas: a tensor as ``t: bf16[8, 2048]``, anything else as Python writes
        it."""
        return ", ".join(f"{name}={text_of(value)}" if name else text_of(value) for name, value in self.inputs)

    @property
    def result(self) -> str | None:
        """The result as such text; None if the call raised."""
        return None if self.output is None else text_of(self.output)

    def text_before_result(self) -> str:
        """The call's line in the trace, as far as it is known when it begins."""
        return f"{'  ' * self.depth}{self.op.removesuffix('.default')}({self.arguments})"

    def __str__(self) -> str:
        result = "raised" if self.result is None else self.result
        return f"{self.text_before_result()}  ->  {result}"


@dataclass(eq=False)
class TraceEvent(OpCall):
    """A call of an IR op or native inside a mode, and what became of it, as :attr:`Trace.events` lists them.

    Use it in tests, where a printed trace would say too much:

    >>> mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), trace=True)
    >>> with mode:
    ...     y = dc.ops.silu_and_mul(torch.ones(8, 256))
    ...     y = dc.ops.silu_and_mul(torch.ones(8, 256, device="meta"))
    >>> for event in mode.trace.events:
    ...     print(event.action, event.provider, event.specialization, event.reason)
    compiled native [s0, 256] None
    aside native None x is on the meta device

    Attributes:
        action: ``"compiled"``: the call ran compiled. ``"eager"``: there was no compiled code for it, and it ran
            eagerly. ``"aside"``: the call stepped aside; it ran as if there were no mode.
        reason: why it did not run compiled; None if it did.
        provider: whose implementation ran: the one that the op's dispatch chose, or ``"kernel"`` for the own kernel of
            an op of another library, which runs where the reference given for it does not run compiled. None if the
            op's dispatch raised.
        specialization: the sizes of the compiled code's tensor arguments, ``[s0, 2048], [2048]``; None if not compiled.
        new: whether this call compiled the specialization.
        loaded: whether this call loaded the specialization, which was saved.
        fuses: the IR ops that the implementation calls, and that are part of the compiled code, each once.
        not_fused: the other IR ops that it calls, each with the reason: ``"rms_norm: provider 'x' is not in providers
            …"``.
        difference: how a new specialization differs from the nearest existing one; None if it was the first.
        compile_start: when compilation began, on the clock of ``start``; None if this call did not compile.
        compile_nanoseconds: how long compilation took, failures included.
    """

    action: str = ASIDE
    reason: str | None = None
    provider: str | None = None
    specialization: str | None = None
    new: bool = False
    loaded: bool = False
    fuses: tuple[str, ...] = ()
    not_fused: tuple[str, ...] = ()
    difference: str | None = None
    compile_start: int | None = None
    compile_nanoseconds: int = 0

    def compiled(self, provider: str, specialization: str, new: bool, composition: Composition) -> None:
        self.action, self.provider, self.specialization, self.new = COMPILED, provider, specialization, new
        self.fuses = tuple(composition.fused)
        self.not_fused = tuple(f"{name}: {why}" for name, why in composition.left.items())

    def not_compiled(self, action: str, reason: str) -> None:
        self.action, self.reason = action, reason

    def raised(self, error: BaseException) -> None:
        if self.reason is None:
            self.not_compiled(EAGER, f"the call ended in {type(error).__name__}")

    def decided_like(self, other: TraceEvent) -> None:
        """Take over what was decided of the same call in another trace, where it may be nested otherwise."""
        for name in TraceEvent.__annotations__:
            setattr(self, name, getattr(other, name))

    def __str__(self) -> str:
        ran = self.action if self.provider is None else f"{self.action} {self.provider}"
        return f"{super().__str__()}  # {ran}, {self._why()}"

    def _why(self) -> str:
        if self.action != COMPILED:
            return self.reason or ""
        came = "new" if self.new else "loaded" if self.loaded else "reused"
        fuses = f"fuses {', '.join(self.fuses)}" if self.fuses else None
        not_fused = [f"not {why}" for why in self.not_fused] if came != "reused" else []
        return "; ".join(filter(None, [f"{came}: {self.specialization}", fuses, *not_fused, self.difference]))
