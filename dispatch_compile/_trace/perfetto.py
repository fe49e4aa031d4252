"""Traces in Chrome's trace event format, which ui.perfetto.dev and chrome://tracing draw.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from .event import OpCall, TraceEvent

_PROCESS = 1
_FIRST_THREAD = 2  # to Perfetto 0 is the idle task of Linux, and a process's own number its main thread


class _Slice(NamedTuple):
    """A bar in the picture.

    Attributes:
        start: as in :class:`OpCall`, like ``nanoseconds``.
        details: what is shown of it when it is selected.
    """

    name: str
    category: str
    thread: int
    start: int
    nanoseconds: int | None
    details: dict[str, Any]


def write(calls: Sequence[OpCall], dropped: int, path: str | os.PathLike[str]) -> None:
    """Write a file of a trace's calls, which is replaced if it exists; so many more were dropped.

    Raises:
        OSError: the file cannot be written.
    """
    document = {"otherData": {"dropped": dropped}, "traceEvents": [*_names(calls), *_complete_events(calls)]}
    text = json.dumps(document)
    with open(path, "w", encoding="ascii") as file:
        file.write(f"{text}\n")


def _names(calls: Iterable[OpCall]) -> Iterator[dict[str, Any]]:
    process = {"name": "dispatch_compile"}
    yield {"ph": "M", "name": "process_name", "pid": _PROCESS, "tid": _FIRST_THREAD, "args": process}
    for number in sorted({call.thread for call in calls}):
        thread = {"name": f"thread {number}"}
        yield {"ph": "M", "name": "thread_name", "pid": _PROCESS, "tid": _FIRST_THREAD + number, "args": thread}


def _complete_events(calls: Iterable[OpCall]) -> Iterator[dict[str, Any]]:
    """The slices, in microseconds from the first. What has not ended lasts as long as the trace."""
    slices = [each for call in calls for each in _slices_of(call)]
    origin = min((each.start for each in slices), default=0)
    end = max((each.start + (each.nanoseconds or 0) for each in slices), default=0)
    for each in slices:
        nanoseconds = end - each.start if each.nanoseconds is None else each.nanoseconds
        yield {
            "ph": "X",
            "name": each.name,
            "cat": each.category,
            "ts": (each.start - origin) / 1000,
            "dur": nanoseconds / 1000,
            "pid": _PROCESS,
            "tid": _FIRST_THREAD + each.thread,
            "args": each.details,
        }


def _slices_of(call: OpCall) -> Iterator[_Slice]:
    """The call, and inside it what it compiled."""
    name = call.op.removesuffix(".default")
    if not isinstance(call, TraceEvent):
        yield _Slice(name, "op", call.thread, call.start, call.nanoseconds, _details_of(call))
        return
    decision = _decision_of(call)
    yield _Slice(name, "ir_op", call.thread, call.start, call.nanoseconds, _details_of(call) | decision)
    if call.compile_start is not None:
        nanoseconds = call.compile_nanoseconds
        yield _Slice(f"compile {name}", "compile", call.thread, call.compile_start, nanoseconds, decision)


def _details_of(call: OpCall) -> dict[str, Any]:
    without_result = "not finished" if call.nanoseconds is None else "raised"
    details: dict[str, Any] = {"arguments": call.arguments, "result": call.result or without_result}
    if call.stack:
        details["stack"] = list(call.stack)
    return details


def _decision_of(event: TraceEvent) -> dict[str, Any]:
    names = ("action", "reason", "provider", "specialization", "new", "difference")
    return {name: value for name in names if (value := getattr(event, name)) is not None}
