"""Traces as files: what is loaded is what was saved, and a file that is not whole says where and why."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from support import EAGER_OR_NATIVE
from torch import Tensor

import dispatch_compile as dc
from dispatch_compile._basics.summary import TensorSummary
from dispatch_compile._trace.files import VERSION

PAGE = Path(__file__).parents[2] / "docs" / "trace_format.md"

ROWS = TensorSummary("bf16", (4, 8), None, "cpu")
EVERY_FIELD_SET = dc.TraceEvent(
    op="vllm_ir::rms_norm.default",
    inputs=((None, ROWS), (None, "1e-06"), ("out", [ROWS, ("None", [])])),
    depth=1,
    thread=2,
    start=1_500,
    nanoseconds=9_000,
    output=(ROWS._replace(shape=(4, "s0"), id=3), ROWS._replace(strides=(1, 4))),
    stack=("model.py:7 in forward",),
    action="compiled",
    provider="native",
    specialization="[s0, 8]",
    new=True,
    loaded=True,
    fuses=("rms_norm", "silu_and_mul"),
    not_fused=("quant: its dispatch raises TypeError",),
    difference="x is bf16, was f32",
    compile_start=2_000,
    compile_nanoseconds=7_000,
)


def trace_of(*calls: dc.OpCall, dropped: int = 0) -> dc.Trace:
    trace = dc.Trace()
    trace._calls.extend(calls)
    trace.dropped = dropped
    return trace


@pytest.fixture
def made() -> dc.Trace:
    """A call in another, and one that raised."""
    outer = dc.OpCall("mylib::layer.default", ((None, ROWS),), thread=2, start=1_000, nanoseconds=10_000, output=ROWS)
    raised = dc.TraceEvent("vllm_ir::rms_norm.maybe_inplace", (), start=20_000, nanoseconds=5, reason="it is a \n")
    return trace_of(outer, EVERY_FIELD_SET, raised, dropped=3)


@pytest.fixture
def saved(made: dc.Trace, tmp_path: Path) -> Path:
    return made.save(tmp_path / "trace.jsonl")


def assert_same_trace(actual: dc.Trace, expected: dc.Trace) -> None:
    assert list(map(repr, actual.calls)) == list(map(repr, expected.calls))  # a call's repr has its type and fields
    assert [str(event) for event in actual.events] == [str(event) for event in expected.events]
    assert (actual.text(), actual.text(all_ops=False)) == (expected.text(), expected.text(all_ops=False))
    assert actual.summary() == expected.summary()
    assert (actual.all_ops, actual.dropped) == (expected.all_ops, expected.dropped)


def load_error(path: Path, content: bytes) -> str:
    """What the error says behind the path."""
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}, ")) as raised:
        dc.Trace.load(path)
    return str(raised.value).removeprefix(f"{path}, ")


def test_the_file(made, saved, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    assert_expected_inline(
        made.save(saved).read_text(),
        """\
{"schema": "dispatch_compile.trace", "version": 4, "torch": "2.13.0", "all_ops": false, "dropped": 3, "calls": 3}
{"kind": "op", "op": "mylib::layer.default", "inputs": [{"name": null, "value": {"dtype": "bf16", "shape": [4, 8], "strides": null, "device": "cpu", "id": null}}], "depth": 0, "thread": 2, "start": 1000, "nanoseconds": 10000, "output": {"dtype": "bf16", "shape": [4, 8], "strides": null, "device": "cpu", "id": null}, "stack": []}
{"kind": "ir_op", "op": "vllm_ir::rms_norm.default", "inputs": [{"name": null, "value": {"dtype": "bf16", "shape": [4, 8], "strides": null, "device": "cpu", "id": null}}, {"name": null, "value": "1e-06"}, {"name": "out", "value": {"list": [{"dtype": "bf16", "shape": [4, 8], "strides": null, "device": "cpu", "id": null}, {"tuple": ["None", {"list": []}]}]}}], "depth": 1, "thread": 2, "start": 1500, "nanoseconds": 9000, "output": {"tuple": [{"dtype": "bf16", "shape": [4, "s0"], "strides": null, "device": "cpu", "id": 3}, {"dtype": "bf16", "shape": [4, 8], "strides": [1, 4], "device": "cpu", "id": null}]}, "stack": ["model.py:7 in forward"], "action": "compiled", "reason": null, "provider": "native", "specialization": "[s0, 8]", "new": true, "loaded": true, "fuses": ["rms_norm", "silu_and_mul"], "not_fused": ["quant: its dispatch raises TypeError"], "difference": "x is bf16, was f32", "compile_start": 2000, "compile_nanoseconds": 7000}
{"kind": "ir_op", "op": "vllm_ir::rms_norm.maybe_inplace", "inputs": [], "depth": 0, "thread": 0, "start": 20000, "nanoseconds": 5, "output": null, "stack": [], "action": "aside", "reason": "it is a \\n", "provider": null, "specialization": null, "new": false, "loaded": false, "fuses": [], "not_fused": [], "difference": null, "compile_start": null, "compile_nanoseconds": 0}
""",  # noqa: E501 - a line of the file is a call
    )


def test_every_field_of_a_call_is_in_the_file(saved):
    _, call, event, _ = map(json.loads, saved.read_text().splitlines())
    assert list(call) == ["kind", *(field.name for field in dataclasses.fields(dc.OpCall))]
    assert list(event) == ["kind", *(field.name for field in dataclasses.fields(dc.TraceEvent))]
    defaults = dc.TraceEvent("", ())
    for field in dataclasses.fields(dc.TraceEvent):
        if field.name != "reason":  # which a compiled call does not have
            assert getattr(EVERY_FIELD_SET, field.name) != getattr(defaults, field.name), "not seen by a round trip"


def test_round_trip(made, saved):
    assert_same_trace(dc.Trace.load(saved), made)


def test_saving_again_gives_the_same_file(made, saved, tmp_path):
    assert made.save(tmp_path / "again").read_bytes() == saved.read_bytes()
    assert dc.Trace.load(str(saved)).save(tmp_path / "loaded").read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("options", [{}, {"all_ops": True}, {"ids": True, "stacks": True}, {"max_events": 3}])
@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_round_trip_of_what_a_mode_traced(options, define_ir_op, define_opaque, tmp_path):
    def file_scale(x: Tensor, weights: list[Tensor], factor: float = 2.0) -> tuple[Tensor, Tensor]:
        return x * factor, x.t() + weights[0]

    def file_item(x: Tensor) -> Tensor:
        return x * x.sum().item()

    def file_fail(x: Tensor) -> Tensor:
        raise KeyError("no")

    scale, item, fail = (define_ir_op(native) for native in (file_scale, file_item, file_fail))

    def file_layer(x: Tensor) -> Tensor:
        return scale(x, [x[0]], 3.0)[1].contiguous()

    layer = define_opaque(file_layer)
    mode = dc.DispatchCompileMode(config=EAGER_OR_NATIVE, trace=dc.Trace(**options))
    with mode:
        layer(torch.ones(4, 4))
        item(layer(torch.ones(4, 4).t()))
        item(torch.ones(4, 4, requires_grad=True))
        with pytest.raises(KeyError):
            fail(torch.ones(4, 4))
    assert {event.action for event in mode.trace.events} >= {"eager", "aside"}
    assert mode.trace.dropped == (4 if "max_events" in options else 0)
    assert_same_trace(dc.Trace.load(mode.trace.save(tmp_path / "trace.jsonl")), mode.trace)


def test_an_empty_trace(tmp_path):
    path = dc.Trace(all_ops=True).save(tmp_path / "trace.jsonl")
    assert len(path.read_text().splitlines()) == 1
    assert_same_trace(dc.Trace.load(path), dc.Trace(all_ops=True))


texts = st.text(max_size=5)
counts = st.integers(0)
tensors = st.builds(
    TensorSummary,
    dtype=texts,
    shape=st.lists(st.integers() | texts).map(tuple),
    strides=st.none() | st.lists(counts).map(tuple),
    device=texts,
    id=st.none() | counts,
)
several = st.deferred(lambda: st.lists(summaries, max_size=2))
summaries = tensors | texts | several | several.map(tuple)
fields_of_call = {
    "op": texts,
    "inputs": st.lists(st.tuples(st.none() | texts, summaries), max_size=3).map(tuple),
    "depth": st.integers(0, 9),
    "thread": counts,
    "start": st.integers(),
    "nanoseconds": st.none() | counts,
    "output": st.none() | summaries,
    "stack": st.lists(texts, max_size=2).map(tuple),
}
fields_of_event = fields_of_call | {
    "action": st.sampled_from(["compiled", "eager", "aside"]),
    "reason": st.none() | texts,
    "provider": st.none() | texts,
    "specialization": st.none() | texts,
    "new": st.booleans(),
    "loaded": st.booleans(),
    "fuses": st.lists(texts, max_size=2).map(tuple),
    "not_fused": st.lists(texts, max_size=2).map(tuple),
    "difference": st.none() | texts,
    "compile_start": st.none() | st.integers(),
    "compile_nanoseconds": counts,
}
calls = st.builds(dc.OpCall, **fields_of_call) | st.builds(dc.TraceEvent, **fields_of_event)


@given(st.lists(calls, max_size=4), counts)
def test_round_trip_of_any_call(tmp_path_factory, calls, dropped):
    trace = trace_of(*calls, dropped=dropped)
    assert_same_trace(dc.Trace.load(trace.save(tmp_path_factory.getbasetemp() / "any.jsonl")), trace)


def test_a_file_cut_anywhere(saved):
    whole = saved.read_bytes()
    for length in range(1, len(whole)):
        lines = whole[:length].count(b"\n")
        readable = f"{lines - 1} of 3 calls" if lines else "no call"
        place = "ends before this line" if whole[:length].endswith(b"\n") else "ends in the middle of this line"
        error = load_error(saved, whole[:length])
        assert error.startswith(f"line {lines + 1}: "), error
        assert error.endswith(f"the file {place} ({readable} could be read)"), error


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"", "the file is empty"),
        (b"\n", "not the header of a trace: not JSON: Expecting value at column 1"),
        (b"mylib::layer(t: f32[4])\n", "not the header of a trace: not JSON: Expecting value at column 1"),
        (b'{"traceEvents": []}\n', "not the header of a trace: \"schema\" is not 'dispatch_compile.trace'"),
        (b"[1, 2]\n", "not the header of a trace: \"schema\" is not 'dispatch_compile.trace'"),
        (
            b"\x80\x04\n",
            "not the header of a trace: not JSON: "
            "'utf-8' codec can't decode byte 0x80 in position 0: invalid start byte",
        ),
    ],
)
def test_another_kind_of_file(tmp_path, content, wrong):
    assert load_error(tmp_path / "other", content) == f"line 1: {wrong} (no call could be read)"


def test_a_newer_version(saved):
    header, _, calls = saved.read_text().partition("\n")
    newer = json.dumps(json.loads(header) | {"version": VERSION + 1, "something": "new"})
    assert load_error(saved, f"{newer}\n{calls}".encode()) == (
        "line 1: version 5 of the schema is newer than 4, which is what can be read here (no call could be read)"
    )


def test_a_line_too_many(saved):
    error = load_error(saved, saved.read_bytes() + b"\n")
    assert error == "line 5: the header says 3 calls, and here is another line (3 of 3 calls could be read)"


def with_line(path: Path, number: int, line: Any) -> bytes:
    """The content of a file with another line in place of one."""
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps(line)
    return "".join(f"{line}\n" for line in lines).encode()


def places_in(value: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every value inside a line: what messages call it, the object or array that it is in, and where there."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        inner_name = f"{name}[{key}]" if isinstance(value, list) else f"{name}.{key}".removeprefix(".")
        yield inner_name, value, key
        if isinstance(inner, (dict, list)):
            yield from places_in(inner, inner_name)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_wrong_value_anywhere_in_a_line(saved, number):
    content = saved.read_bytes()
    readable = f"({number - 2} of 3 calls could be read)" if number > 1 else "(no call could be read)"
    for position in range(len(list(places_in(json.loads(content.splitlines()[number - 1]))))):
        line = json.loads(content.splitlines()[number - 1])
        name, holder, key = list(places_in(line))[position]
        holder[key] = {"what no field": "may hold"}
        saved.write_bytes(content)
        error = load_error(saved, with_line(saved, number, line))
        assert error.startswith(f"line {number}: "), error
        assert f'"{name}' in error, error
        assert error.endswith(readable), error


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_field_missing_or_too_many(saved, number):
    content = saved.read_bytes()
    line = json.loads(content.splitlines()[number - 1])
    for name in line:
        saved.write_bytes(content)
        rest = {key: value for key, value in line.items() if key != name}
        assert f'"{name}"' in load_error(saved, with_line(saved, number, rest))
    saved.write_bytes(content)
    error = load_error(saved, with_line(saved, number, line | {"color": "red"}))
    assert '"color" is not a field of the schema' in error


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("kind", "aten", """"kind" must be "op" or "ir_op", not 'aten'"""),
        ("depth", -1, '"depth" must be a whole number, not negative, not -1'),
        ("depth", True, '"depth" must be a whole number, not negative, not True'),
        ("start", 1.5, '"start" must be a whole number, not 1.5'),
        ("new", 1, '"new" must be true or false, not 1'),
        ("action", "compile", "\"action\" must be compiled, eager or aside, not 'compile'"),
        ("stack", "model.py:7", "\"stack\" must be an array, not 'model.py:7'"),
        ("output", 3, '"output" must be a tensor, a list, a tuple or a string, not 3'),
        (
            "output",
            {"list": [{"tuple": [None]}]},
            '"output.list[0].tuple[0]" must be a tensor, a list, a tuple or a string, not None',
        ),
        ("inputs", [[None, "1"]], "\"inputs[0]\" must be an object, not [None, '1']"),
    ],
)
def test_what_is_said_of_a_wrong_value(saved, name, value, wrong):
    line = json.loads(saved.read_text().splitlines()[2]) | {name: value}
    assert load_error(saved, with_line(saved, 3, line)) == f"line 3: {wrong} (1 of 3 calls could be read)"


@pytest.mark.parametrize("line", [b"[]", b"null", b"7", b'{"kind": ', b"\xff", b"9" * 5000, b"[" * 100_000])
def test_a_line_that_is_no_object(saved, line):
    first, _, *others = saved.read_bytes().splitlines()
    error = load_error(saved, b"".join(line + b"\n" for line in (first, line, *others)))
    assert error.startswith("line 2: "), error
    assert error.endswith(" (0 of 3 calls could be read)"), error


def test_values_in_each_other_deeper_than_python_goes(saved):
    line = json.loads(saved.read_text().splitlines()[2])
    for _ in range(sys.getrecursionlimit() // 3):
        line["output"] = {"list": [line["output"]]}
    assert load_error(saved, with_line(saved, 3, line)).startswith("line 3: maximum recursion depth exceeded")


def test_a_path_that_cannot_be_opened(made, tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "trace.jsonl"):
        for access in (made.save, made.load):
            with pytest.raises(OSError, match=re.escape(str(path))) as raised:
                access(path)
            assert raised.value.filename == str(path)


def test_the_example_on_the_page(tmp_path):
    [(lines, text)] = re.findall(r"```json\n(.*?)```.*?```\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    path = tmp_path / "trace.jsonl"
    path.write_text(lines)
    trace = dc.Trace.load(path)
    assert str(trace) == text.rstrip()
    assert {type(call) for call in trace.calls} == {dc.OpCall, dc.TraceEvent}


def test_the_page_explains_every_field(saved):
    explained = set(re.findall(r"^\| `(\w+)`", PAGE.read_text(), flags=re.MULTILINE))
    header, _, event, _ = map(json.loads, saved.read_text().splitlines())
    tensor = set(TensorSummary._fields)
    assert explained == header.keys() | event.keys() | tensor
