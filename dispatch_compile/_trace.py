"""What a mode did, for people: one line per call that it considered, in the format of torch's DebugMode.

No times, addresses or running numbers are in the text, so the same program gives the same text on every machine.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, TypeVar

import torch

from ._checks import check_bools, check_whole
from ._fork import freed_in_children
from ._inlining import Composition
from ._summary import Summary, TensorNumbers, summary_of, text_of
from ._trace_summary import table_of

COMPILED = "compiled"
EAGER = "eager"
PASSED = "passed"

_OWN_FOLDER = os.path.dirname(__file__)
_TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep


@dataclass(eq=False)
class OpCall:
    """A call of an op that a trace saw.

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
        """The arguments as ``t: bf16[8, 2048]`` or a Python value, separated by commas."""
        return ", ".join(f"{name}={text_of(value)}" if name else text_of(value) for name, value in self.inputs)

    @property
    def result(self) -> str | None:
        """The result in the same form; None if the call raised."""
        return None if self.output is None else text_of(self.output)

    def text_before_result(self) -> str:
        """The call's line in the trace, as far as it is known when it begins."""
        return f"{'  ' * self.depth}{self.op.removesuffix('.default')}({self.arguments})"

    def __str__(self) -> str:
        result = "raised" if self.result is None else self.result
        return f"{self.text_before_result()}  ->  {result}"


@dataclass(eq=False)
class TraceEvent(OpCall):
    """A call of an IR op inside a mode.

    Attributes:
        action: ``"compiled"``: compiled code ran; ``"eager"``: there is no compiled code for this call, and the op ran
            eagerly; ``"passed"``: the call went on as if there were no mode.
        reason: why it was not compiled; None when it was.
        provider: whose implementation ran: the provider that the op's dispatch chose, or ``"kernel"`` for the own
            kernel of an op of another library, which runs where the reference given for it is not compiled. None if
            the op's dispatch raised.
        specialization: the sizes of the compiled code's tensor arguments, ``[s0, 2048], [2048]``; None if not compiled.
        new: whether this call made the specialization.
        loaded: whether this call loaded it, since it had been saved.
        fuses: the IR ops called inside whose implementations are part of the compiled code, each once.
        not_fused: the other IR ops called inside, each with why: ``"rms_norm: provider 'x' is not in providers …"``.
        difference: in what a new specialization differs from the nearest that there was; None if it was the first.
        compile_start: when compilation began, like ``start``; None if this call did not compile.
        compile_nanoseconds: how long it took, failures included.
    """

    action: str = PASSED
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


Call = TypeVar("Call", bound=OpCall)


class _OfThread(threading.local):
    """Where a thread is in a trace.

    Attributes:
        number: the thread's number in the trace; negative before its first call.
        calls: the calls that it is in, outermost first.
        kept: how many of them are in the trace: the outer ones.
        printed: how many of them are printed.
    """

    def __init__(self) -> None:
        self.number = -1
        self.calls: list[OpCall] = []
        self.kept = self.printed = 0


class Trace:
    """The calls that tracing modes considered, in order; ``str(trace)`` is a line for each.

    Calls of other ops appear as the lines that the IR ops are indented under, and only if they have any; with
    ``all_ops=True`` every one appears. Several modes and threads may share a trace.

    Args:
        all_ops: record every op that the thread calls. Only then is a mode on torch's own stack of modes, and every
            op costs microseconds more (:attr:`DispatchCompileMode.interception`).
        ids: number the tensors, ``t$3: bf16[8, 2048]``, so that one can follow the data.
        stacks: record where each call comes from.
        max_events: how many calls to keep; of more, the oldest are dropped and counted. None keeps all.
        stream: where to print each line as soon as its call ends. A call that others are indented under is printed
            when the first of them begins, without its result.

    Attributes:
        dropped: how many calls were dropped.

    Raises:
        ValueError: ``max_events`` is negative.
        TypeError: an argument of the wrong type.
    """

    def __init__(
        self,
        *,
        all_ops: bool = False,
        ids: bool = False,
        stacks: bool = False,
        max_events: int | None = None,
        stream: IO[str] | None = None,
    ) -> None:
        check_bools("Trace", all_ops=all_ops, ids=ids, stacks=stacks)
        if max_events is not None:
            check_whole("Trace", "max_events", max_events, least=0)
        if stream is not None and not all(callable(getattr(stream, name, None)) for name in ("write", "flush")):
            raise TypeError(f"Trace: stream must be a file to write text to, such as sys.stderr, not {stream!r}")
        self.all_ops = all_ops
        self._ids = ids
        self._stacks = stacks
        self._stream = stream
        self._lock = freed_in_children(threading.Lock())
        self._calls: deque[OpCall] = deque(maxlen=max_events)
        self._threads = 0
        self._of_thread = _OfThread()
        self.clear()

    def clear(self) -> None:
        """Forget what was recorded."""
        with self._lock:
            self._calls.clear()
            self.dropped = 0
            self._numbers = TensorNumbers() if self._ids else None

    @property
    def calls(self) -> list[OpCall]:
        """All calls that the text shows, in the order in which they began."""
        with self._lock:
            return list(self._calls)

    @property
    def events(self) -> list[TraceEvent]:
        """The calls of IR ops."""
        return [call for call in self.calls if isinstance(call, TraceEvent)]

    def begin(self, kind: type[Call], op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """An op or function of this full name is called; ``kind`` is :class:`TraceEvent` for one that is caught."""
        thread = self._of_thread
        if thread.number < 0:
            with self._lock:
                thread.number, self._threads = self._threads, self._threads + 1
        numbers = self._numbers
        inputs: list[tuple[str | None, Summary]] = [(None, summary_of(value, numbers)) for value in args]
        if kwargs:
            inputs += [(name, summary_of(value, numbers)) for name, value in kwargs.items()]
        stack = _call_site() if self._stacks else ()
        depth = len(thread.calls)
        call = kind(op, tuple(inputs), depth, thread.number, time.perf_counter_ns(), stack=stack)
        if self.all_ops or kind is TraceEvent:
            if self._stream is not None:
                self._print_outer(thread)
            self._keep([*thread.calls[thread.kept :], call] if thread.kept < depth else [call])
            thread.kept = depth + 1
        thread.calls.append(call)
        return call

    def end(self, call: OpCall, result: Any) -> None:
        """The call that began last on this thread has returned."""
        call.nanoseconds = time.perf_counter_ns() - call.start
        call.output = summary_of(result, self._numbers)
        self._left(call)

    def end_raising(self, call: OpCall, error: BaseException) -> None:
        """The call that began last on this thread has raised."""
        call.nanoseconds = time.perf_counter_ns() - call.start
        if isinstance(call, TraceEvent):
            call.raised(error)
        self._left(call)

    def _left(self, call: OpCall) -> None:
        thread = self._of_thread
        thread.calls.pop()
        depth = len(thread.calls)
        if self._stream is not None and thread.kept > depth and (thread.printed <= depth or type(call) is TraceEvent):
            self._print(str(call))
        if thread.kept > depth:
            thread.kept = depth
        if thread.printed > depth:
            thread.printed = depth

    def _keep(self, calls: list[OpCall]) -> None:
        with self._lock:
            if self._calls.maxlen is not None:
                self.dropped += max(0, len(self._calls) + len(calls) - self._calls.maxlen)
            self._calls.extend(calls)

    def _print_outer(self, thread: _OfThread) -> None:
        for call in thread.calls[thread.printed :]:
            self._print(call.text_before_result())
        thread.printed = len(thread.calls)

    def _print(self, line: str) -> None:
        assert self._stream is not None
        self._stream.write(f"{line}\n")
        self._stream.flush()

    def text(self, *, all_ops: bool = True) -> str:
        """The trace as text, a line for each call.

        Args:
            all_ops: also the calls that no call of an IR op is indented under, if they were recorded.

        Where several threads are in the trace, lines begin with the thread's number. Call sites, if recorded, follow
        the line of their call.
        """
        check_bools("Trace.text", all_ops=all_ops)
        calls = self.calls
        if not all_ops:
            calls = _leading_to_events(calls)
        several = len({call.thread for call in calls}) > 1
        lines = [f"({self.dropped} earlier calls dropped)"] if self.dropped else []
        for call in calls:
            lines.append(f"[{call.thread}] {call}" if several else str(call))
            lines += [f"{'  ' * call.depth}    at {site}" for site in call.stack]
        return "\n".join(lines)

    def summary(self, *, markdown: bool = False, seconds: bool = True) -> str:
        """A table, one row for each op and provider: calls, how many were compiled, eager and passed, specializations
        made, and the seconds that compiling took.

        Args:
            markdown: as a Markdown table, not as aligned plain text.
            seconds: with the seconds; they differ from run to run.
        """
        check_bools("Trace.summary", markdown=markdown, seconds=seconds)
        return table_of(self.events, markdown=markdown, seconds=seconds)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the trace to a file that :meth:`load` reads, as JSON lines (docs/trace_format.md).

        Returns:
            The path.

        Raises:
            OSError: the file cannot be written.
        """
        from ._trace_file import write

        write(self, path)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace that :meth:`save` wrote. It is to be looked at: what is recorded into it has another clock.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is not a whole trace, or of a newer version; the text says where, and what is wrong.
        """
        from ._trace_file import read

        recording = read(path)
        trace = cls(all_ops=recording.all_ops)
        trace._calls.extend(recording.calls)
        trace.dropped = recording.dropped
        return trace

    def to_perfetto(self, path: str | os.PathLike[str]) -> Path:
        """Write the trace as a timeline for ui.perfetto.dev or chrome://tracing.

        Each call is a slice, inside the calls that it is nested in, and so is each compilation. A trace without calls
        gives a timeline without slices.

        Returns:
            The path.

        Raises:
            OSError: the file cannot be written.
        """
        from ._perfetto import write

        write(self, path)
        return Path(path)

    def __len__(self) -> int:
        return len(self.events)

    def __str__(self) -> str:
        return self.text()


def _leading_to_events(calls: list[OpCall]) -> list[OpCall]:
    """The calls of IR ops, and those that they are nested in."""
    wanted: list[OpCall] = []
    depths: dict[int, int] = {}  # by thread: calls less deep than this have a wanted call inside
    for call in reversed(calls):
        inner = depths.get(call.thread, 0)
        if isinstance(call, TraceEvent) or call.depth < inner:
            wanted.append(call)
            depths[call.thread] = call.depth
    return wanted[::-1]


def _call_site() -> tuple[str, ...]:
    """The frames of the caller, outermost first, without torch's and this package's own."""
    return tuple(_sites(sys._getframe(1)))[::-1]


def _sites(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_TORCH_FOLDER) and os.path.dirname(file) != _OWN_FOLDER:
            yield f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
