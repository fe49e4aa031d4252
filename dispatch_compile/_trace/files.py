"""Traces as files of JSON lines: a header, then a line for each call. docs/trace_format.md describes the schema."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from .._basics.summary import Summary, TensorSummary
from .event import ASIDE, COMPILED, EAGER, OpCall, TraceEvent

SCHEMA = "dispatch_compile.trace"
VERSION = 4  # goes up with every change of what a line may hold


@dataclass(frozen=True)
class Recording:
    """What a file holds of a trace.

    Attributes:
        all_ops: whether it has every op.
        dropped: how many calls were thrown away.
        calls: in the order in which they began.
    """

    all_ops: bool
    dropped: int
    calls: list[OpCall]


class _Malformed(Exception):
    """What is wrong with a line."""


def write(recording: Recording, path: str | os.PathLike[str]) -> None:
    """Write a file, which is replaced if it exists.

    Raises:
        OSError: the file cannot be written.
    """
    header = {
        "schema": SCHEMA,
        "version": VERSION,
        "torch": str(torch.__version__),
        "all_ops": recording.all_ops,
        "dropped": recording.dropped,
        "calls": len(recording.calls),
    }
    with open(path, "w", encoding="ascii", newline="\n") as file:
        for line in (header, *map(_line_of, recording.calls)):
            file.write(f"{json.dumps(line)}\n")


def _line_of(call: OpCall) -> dict[str, Any]:
    kind = "ir_op" if isinstance(call, TraceEvent) else "op"
    line: dict[str, Any] = {"kind": kind, **{name: getattr(call, name) for name in _KINDS[kind].fields}}
    line["inputs"] = [{"name": name, "value": _value_of(summary)} for name, summary in call.inputs]
    line["output"] = None if call.output is None else _value_of(call.output)
    return line


def _value_of(summary: Summary) -> Any:
    if isinstance(summary, TensorSummary):
        return summary._asdict()
    if isinstance(summary, (list, tuple)):
        return {
            "list" if isinstance(summary, list) else "tuple": [
                _value_of(item) for item in cast(Sequence[Summary], summary)
            ]
        }
    return summary


def read(path: str | os.PathLike[str]) -> Recording:
    """Read what :func:`write` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a whole trace of this version of the schema. The text names file and line, and says
            how many calls come before it.
    """
    header, calls = None, []
    try:
        with open(path, "rb") as file:
            header = _header_of(file.readline())
            for _ in range(header["calls"]):
                calls.append(_call_of(file.readline()))
            if file.readline():
                raise _Malformed(f"the header says {len(calls)} calls, and here is another line")
    except (_Malformed, RecursionError) as error:
        line, readable = 1, "no call"
        if header is not None:
            line, readable = len(calls) + 2, f"{len(calls)} of {header['calls']} calls"
        raise ValueError(f"{os.fspath(path)}, line {line}: {error} ({readable} could be read)") from None
    return Recording(header["all_ops"], header["dropped"], calls)


def _header_of(line: bytes) -> dict[str, Any]:
    if not line:
        raise _Malformed("the file is empty")
    try:
        header = _json_of(line)
    except _Malformed as error:
        raise _Malformed(f"not the header of a trace: {error}") from None
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        raise _Malformed(f'not the header of a trace: "schema" is not {SCHEMA!r}')
    version = header.get("version")
    if type(version) is int and version > VERSION:
        raise _Malformed(f"version {version} of the schema is newer than {VERSION}, which is what can be read here")
    fields: dict[str, Any] = _HEADER(header, "")
    return fields


def _call_of(line: bytes) -> OpCall:
    if not line:
        raise _Malformed("the file ends before this line")
    value = _json_of(line)
    if not isinstance(value, dict):
        raise _Malformed(f"a line must be an object, not {reprlib.repr(value)}")
    name = value.pop("kind", None)
    if name not in tuple(_KINDS):
        raise _Malformed(f'"kind" must be "op" or "ir_op", not {reprlib.repr(name)}')
    kind = _KINDS[name]
    return kind.make(**_object(kind.fields)(value, ""))


def _json_of(line: bytes) -> Any:
    if not line.endswith(b"\n"):
        raise _Malformed("the file ends in the middle of this line")
    try:
        return json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise _Malformed(f"not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # not UTF-8, or a number with more digits than Python reads
        raise _Malformed(f"not JSON: {error}") from None


# Takes a JSON value and the name of its field, gives what it stands for, or raises _Malformed.
_Reader = Callable[[Any, str], Any]


def _checked(accepts: Callable[[Any], bool], expected: str) -> _Reader:
    def read(value: Any, field: str) -> Any:
        if not accepts(value):
            raise _Malformed(f'"{field}" must be {expected}, not {reprlib.repr(value)}')
        return value

    return read


def _or_null(reader: _Reader) -> _Reader:
    return lambda value, field: None if value is None else reader(value, field)


def _array(reader: _Reader) -> _Reader:
    def read(value: Any, field: str) -> tuple[Any, ...]:
        items = _checked(lambda value: isinstance(value, list), "an array")(value, field)
        return tuple(reader(item, f"{field}[{index}]") for index, item in enumerate(items))

    return read


def _object(fields: Mapping[str, _Reader]) -> _Reader:
    def read(value: Any, field: str) -> dict[str, Any]:
        _checked(lambda value: isinstance(value, dict), "an object")(value, field)
        prefix = f"{field}." if field else ""
        for name in sorted(fields.keys() ^ value.keys()):
            wrong = "is missing" if name in fields else "is not a field of the schema"
            raise _Malformed(f'"{prefix}{name}" {wrong}')
        return {name: reader(value[name], f"{prefix}{name}") for name, reader in fields.items()}

    return read


_STRING = _checked(lambda value: isinstance(value, str), "a string")
_BOOLEAN = _checked(lambda value: isinstance(value, bool), "true or false")
_WHOLE = _checked(lambda value: type(value) is int, "a whole number")
_COUNT = _checked(lambda value: type(value) is int and value >= 0, "a whole number, not negative")
_SIZE = _checked(lambda value: isinstance(value, str) or type(value) is int, "a whole number or a symbol")
_TENSOR = _object(
    {
        "dtype": _STRING,
        "shape": _array(_SIZE),
        "strides": _or_null(_array(_COUNT)),
        "device": _STRING,
        "id": _or_null(_COUNT),
    }
)


def _summary(value: Any, field: str) -> Summary:
    if isinstance(value, str):
        return value
    _checked(lambda value: isinstance(value, dict), "a tensor, a list, a tuple or a string")(value, field)
    if value.keys() == {"list"}:
        return list(_array(_summary)(value["list"], f"{field}.list"))
    if value.keys() == {"tuple"}:
        items: tuple[Summary, ...] = _array(_summary)(value["tuple"], f"{field}.tuple")
        return items
    return TensorSummary(**_TENSOR(value, field))


def _input(value: Any, field: str) -> tuple[str | None, Summary]:
    fields = _object({"name": _or_null(_STRING), "value": _summary})(value, field)
    return fields["name"], fields["value"]


class _Kind(NamedTuple):
    make: type[OpCall]
    fields: Mapping[str, _Reader]


_HEADER = _object(
    {
        "schema": _STRING,
        "version": _checked(lambda value: value == VERSION and type(value) is int, str(VERSION)),
        "torch": _STRING,
        "all_ops": _BOOLEAN,
        "dropped": _COUNT,
        "calls": _COUNT,
    }
)
_CALL_FIELDS: dict[str, _Reader] = {
    "op": _STRING,
    "inputs": _array(_input),
    "depth": _COUNT,
    "thread": _COUNT,
    "start": _WHOLE,
    "nanoseconds": _or_null(_COUNT),
    "output": _or_null(_summary),
    "stack": _array(_STRING),
}
_EVENT_FIELDS: dict[str, _Reader] = {
    "action": _checked(lambda value: value in (COMPILED, EAGER, ASIDE), f"{COMPILED}, {EAGER} or {ASIDE}"),
    "reason": _or_null(_STRING),
    "provider": _or_null(_STRING),
    "specialization": _or_null(_STRING),
    "new": _BOOLEAN,
    "loaded": _BOOLEAN,
    "fuses": _array(_STRING),
    "not_fused": _array(_STRING),
    "difference": _or_null(_STRING),
    "compile_start": _or_null(_WHOLE),
    "compile_nanoseconds": _COUNT,
}
_KINDS = {
    "op": _Kind(OpCall, _CALL_FIELDS),
    "ir_op": _Kind(TraceEvent, {**_CALL_FIELDS, **_EVENT_FIELDS}),
}
