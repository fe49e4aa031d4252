"""What a mode did, for people: one line per call that it considered, in the format of torch's DebugMode.

No times, addresses or running numbers are in the text, so the same program gives the same text on every machine.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ._torch_private import OpOverload, dtype_abbreviation

COMPILED = "compiled"
NATIVE = "native"
PASSED = "passed"


@dataclass
class TraceEvent:
    """One call of an IR op inside a mode.

    Attributes:
        op: ``"ns::name.overload"``.
        action: ``"compiled"``: compiled code ran; ``"native"``: the chosen implementation cannot be compiled for
            this call and ran natively; ``"passed"``: the call went on as if there were no mode.
        reason: why it was not compiled; None when it was.
        depth: how many opaque ops the call is nested in.
        arguments: the arguments, as ``t: bf16[8, 2048]`` or a Python value, separated by commas.
        result: the result in the same form; None if the call raised.
        provider: the provider that the op's dispatch chose.
        specialization: the sizes of the compiled code's tensor arguments, ``[s0, 2048], [2048]``; None if not compiled.
        new: whether this call made the specialization.
    """

    op: str
    arguments: str
    depth: int = 0
    action: str = PASSED
    reason: str | None = None
    provider: str | None = None
    specialization: str | None = None
    new: bool = False
    result: str | None = None

    def compiled(self, specialization: str, new: bool) -> None:
        self.action, self.specialization, self.new = COMPILED, specialization, new

    def not_compiled(self, action: str, reason: str) -> None:
        self.action, self.reason = action, reason

    def ended(self, result: Any) -> None:
        self.result = described(result)

    def raised(self, error: BaseException) -> None:
        if self.reason is None:
            self.not_compiled(NATIVE, f"the call ended in {type(error).__name__}")

    def ended_like(self, other: TraceEvent) -> None:
        """Take over what became of the same call in another trace, where it may be nested otherwise."""
        self.action, self.reason, self.provider = other.action, other.reason, other.provider
        self.specialization, self.new, self.result = other.specialization, other.new, other.result

    def __str__(self) -> str:
        return f"{_call_text(self)}  # {self.action}, {self._why()}"

    def _why(self) -> str:
        if self.action == COMPILED:
            return f"{'new' if self.new else 'reused'}: {self.specialization}"
        return self.reason or ""


@dataclass(eq=False)
class _OpaqueCall:
    op: str
    arguments: str
    depth: int
    result: str | None = None
    contains_events: bool = False

    def __str__(self) -> str:
        return _call_text(self)


def _call_text(call: TraceEvent | _OpaqueCall) -> str:
    result = "raised" if call.result is None else call.result
    return f"{'  ' * call.depth}{call.op.removesuffix('.default')}({call.arguments})  ->  {result}"


@dataclass
class Trace:
    """The calls that modes with ``trace=True`` considered, in order; ``str(trace)`` is a line for each.

    Opaque ops appear as the lines that their IR ops are indented under, and only if they have any.

    Attributes:
        events: the calls of IR ops.
    """

    _calls: list[TraceEvent | _OpaqueCall] = field(default_factory=list)
    _thread: threading.local = field(default_factory=threading.local)

    @property
    def events(self) -> list[TraceEvent]:
        return [call for call in self._calls if isinstance(call, TraceEvent)]

    def clear(self) -> None:
        """Forget what was recorded."""
        self._calls.clear()

    @contextmanager
    def opaque(self, overload: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[_OpaqueCall]:
        """Record a call of an op that is not an IR op, around its body."""
        parents = self._parents()
        call = _OpaqueCall(_qualified(overload), _described_arguments(args, kwargs), len(parents))
        self._calls.append(call)
        parents.append(call)
        try:
            yield call
        finally:
            parents.pop()
            if not call.contains_events:
                self._calls.remove(call)

    def begin(self, overload: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TraceEvent:
        """Record the call of an IR op, before it is known what becomes of it."""
        parents = self._parents()
        for call in parents:
            call.contains_events = True
        event = TraceEvent(_qualified(overload), _described_arguments(args, kwargs), len(parents))
        self._calls.append(event)
        return event

    def _parents(self) -> list[_OpaqueCall]:
        try:
            parents: list[_OpaqueCall] = self._thread.parents
        except AttributeError:
            parents = self._thread.parents = []
        return parents

    def summary(self) -> str:
        """A table, one row per op: calls, how many were compiled, native and passed, and specializations made."""
        header = ("op", "calls", COMPILED, NATIVE, PASSED, "specializations")
        counts: dict[str, Counter[str]] = {}
        for event in self.events:
            counts.setdefault(event.op.removesuffix(".default"), Counter()).update(
                {"calls": 1, event.action: 1, "specializations": int(event.new)}
            )
        rows = [header] + [(op, *(str(count[column]) for column in header[1:])) for op, count in sorted(counts.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )

    def __len__(self) -> int:
        return len(self.events)

    def __str__(self) -> str:
        return "\n".join(map(str, self._calls))


def _qualified(overload: OpOverload) -> str:
    return f"{overload._schema.name}.{overload._overloadname}"


def _described_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*map(described, args), *(f"{name}={described(value)}" for name, value in kwargs.items())])


def described(value: Any) -> str:
    """A value in the trace's form: ``t: bf16[8, 2048]`` for a tensor, ``(…, …)`` for several."""
    if isinstance(value, torch.Tensor):
        return f"t: {dtype_abbreviation(value.dtype)}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        items = ", ".join(map(described, value))
        return f"[{items}]" if isinstance(value, list) else f"({items})"
    return repr(value)
