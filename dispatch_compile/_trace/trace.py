"""The trace: what a mode did with each call, one line for each.

>>> @torch.library.custom_op("docs::expert", mutates_args=())
... def expert(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
...     return dc.ops.silu_and_mul(x @ w)
>>> with dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), trace=True) as mode:
...     y = expert(torch.ones(8, 64), torch.ones(64, 8))
...     y = expert(torch.ones(9, 64), torch.ones(64, 8))
...     y = expert(torch.ones(9, 64).bfloat16(), torch.ones(64, 8).bfloat16())
...     y = dc.ops.silu_and_mul(torch.ones(8, 8, requires_grad=True))
>>> print(mode.trace)
docs::expert(t: f32[8, 64], t: f32[64, 8])  ->  t: f32[8, 4]
  dispatch_compile::silu_and_mul(t: f32[8, 8])  ->  t: f32[8, 4]  # compiled native, new: [s0, 8]
docs::expert(t: f32[9, 64], t: f32[64, 8])  ->  t: f32[9, 4]
  dispatch_compile::silu_and_mul(t: f32[9, 8])  ->  t: f32[9, 4]  # compiled native, reused: [s0, 8]
docs::expert(t: bf16[9, 64], t: bf16[64, 8])  ->  t: bf16[9, 4]
  dispatch_compile::silu_and_mul(t: bf16[9, 8])  ->  t: bf16[9, 4]  # compiled native, new: [s0, 8]; x is bf16, was f32
dispatch_compile::silu_and_mul(t: f32[8, 8])  ->  t: f32[8, 4]  # aside native, x requires grad and grad mode is on

A line has the op, its arguments, ``->`` and its result. For IR ops and natives, ``#`` follows: what became of the
call, whose implementation ran, and why. Calls are indented under the opaque op that makes them. The format is that of
torch's ``DebugMode``. The text has no times, addresses or running numbers. So the same program gives the same text on
every machine.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import IO, Any, TypeVar

import torch

from .._basics.checks import check_bools, check_whole
from .._basics.fork import freed_in_children
from .._basics.summary import Summary, TensorNumbers, summary_of
from . import files, perfetto
from .event import OpCall, TraceEvent
from .table import table_of

_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_ROOMS = os.path.join(_PACKAGE, "_")  # the private modules' folders; what is beside them may call ops as users do
_TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep


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
    """Records what modes did with each call; give one to :class:`DispatchCompileMode`, or let ``trace=True`` make one.

    ``print(trace)`` shows a line for each call:

    >>> trace = dc.Trace(ids=True)
    >>> with dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), trace=trace):
    ...     y = dc.ops.silu_and_mul(torch.ones(8, 512))
    ...     y = dc.ops.silu_and_mul(y)
    >>> print(trace)
    dispatch_compile::silu_and_mul(t$0: f32[8, 512])  ->  t$1: f32[8, 256]  # compiled native, new: [s0, 512]
    dispatch_compile::silu_and_mul(t$1: f32[8, 256])  ->  t$2: f32[8, 128]
        # compiled native, new: [s0, 256]; x's shape is [s0, 256], was [s0, 512]

    Calls of other custom ops are shown only if IR ops or natives are called inside them. Several modes and threads may
    share a trace.

    Args:
        all_ops: record every op that the thread calls. Only then is the mode on torch's own stack of modes, and every
            op costs microseconds more (:attr:`DispatchCompileMode.interception`).
        ids: number the tensors, as above, so that you can follow the data.
        stacks: record where each call comes from.
        max_events: how many calls to keep. The oldest are dropped, and counted. None keeps all.
        stream: a text file to which each line is printed as soon as its call ends. A call that others are indented
            under is printed when the first of them begins, without its result.

    Attributes:
        all_ops: as given.
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
        """Forget what was recorded, for instance the warm-up.

        >>> with dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), trace=True) as mode:
        ...     y = dc.ops.silu_and_mul(torch.ones(8, 256))
        >>> mode.trace.clear()
        >>> mode.trace.events
        []
        """
        with self._lock:
            self._calls.clear()
            self.dropped = 0
            self._numbers = TensorNumbers() if self._ids else None

    @property
    def calls(self) -> list[OpCall]:
        """All calls that the text shows, in the order in which they began.

        >>> with dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), trace=True) as mode:
        ...     y = dc.ops.silu_and_mul(torch.ones(8, 256))
        >>> [call.op for call in mode.trace.calls]
        ['dispatch_compile::silu_and_mul.default']
        """
        with self._lock:
            return list(self._calls)

    @property
    def events(self) -> list[TraceEvent]:
        """The calls of IR ops and natives, in the order in which they began.

        >>> with dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), trace=True) as mode:
        ...     y = dc.ops.silu_and_mul(torch.ones(8, 256))
        >>> [event.action for event in mode.trace.events]
        ['compiled']
        """
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
        """The trace as text, a line for each call; ``str(trace)`` gives the same.

        >>> with dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), trace=True) as mode:
        ...     y = dc.ops.silu_and_mul(torch.ones(8, 256))
        >>> print(mode.trace.text(all_ops=False))
        dispatch_compile::silu_and_mul(t: f32[8, 256])  ->  t: f32[8, 128]  # compiled native, new: [s0, 256]

        Where several threads are in the trace, lines begin with the thread's number. Call sites, if recorded, follow
        the line of their call.

        Args:
            all_ops: False leaves out the calls that have no call of an IR op or native inside them.

        Raises:
            TypeError: ``all_ops`` is not True or False.
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
        """The trace as a table: see at a glance which ops run compiled, and how often they were compiled.

        >>> with dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), trace=True) as mode:
        ...     y = dc.ops.silu_and_mul(torch.ones(8, 256))
        >>> print(mode.trace.summary(seconds=False))
        op                              provider  calls  compiled  eager  aside  specializations
        dispatch_compile::silu_and_mul  native        1         1      0      0                1

        Args:
            markdown: True for a Markdown table instead of aligned plain text.
            seconds: False leaves out the seconds of compiling, which differ from run to run.

        Raises:
            TypeError: an argument is not True or False.
        """
        check_bools("Trace.summary", markdown=markdown, seconds=seconds)
        return table_of(self.events, markdown=markdown, seconds=seconds)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the trace to a file, to look at it later or elsewhere (:meth:`load`). docs/trace_format.md gives the
        format.

        >>> with dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), trace=True) as mode:
        ...     y = dc.ops.silu_and_mul(torch.ones(8, 256))
        >>> path = mode.trace.save("trace.jsonl")
        >>> str(dc.Trace.load(path)) == str(mode.trace)
        True

        Args:
            path: the file; an existing file is replaced.

        Returns:
            The path.

        Raises:
            OSError: the file cannot be written.
        """
        files.write(files.Recording(self.all_ops, self.dropped, self.calls), path)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace that :meth:`save` wrote. Use it for reading only: new calls would be recorded on another clock.

        >>> path = dc.Trace().save("trace.jsonl")
        >>> dc.Trace.load(path).calls
        []

        Args:
            path: the file.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is not a whole trace, or has a newer version of the format; the text gives the line and
                what is wrong in it.
        """
        recording = files.read(path)
        trace = cls(all_ops=recording.all_ops)
        trace._calls.extend(recording.calls)
        trace.dropped = recording.dropped
        return trace

    def to_perfetto(self, path: str | os.PathLike[str]) -> Path:
        """Write the trace as a timeline, to look at it in ui.perfetto.dev or chrome://tracing.

        Each call is a slice inside the slices of the calls around it, and each compilation is a slice, too.

        >>> with dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), trace=True) as mode:
        ...     y = dc.ops.silu_and_mul(torch.ones(8, 256))
        >>> path = mode.trace.to_perfetto("timeline.json")

        Args:
            path: the file; an existing file is replaced. A trace without calls gives a timeline without slices.

        Returns:
            The path.

        Raises:
            OSError: the file cannot be written.
        """
        perfetto.write(self.calls, self.dropped, path)
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
        own = os.path.dirname(file) == _PACKAGE or file.startswith(_ROOMS)
        if not own and not file.startswith(_TORCH_FOLDER):
            yield f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
