"""Timelines: the files are of Chrome's trace event format, and slices lie in each other as the calls did."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from support import EAGER
from torch import Tensor

import dispatch_compile as dc

COMMON = {"ph": str, "name": str, "pid": int, "tid": int, "args": dict}
REQUIRED = {"M": COMMON, "X": COMMON | {"cat": str, "ts": float, "dur": float}}


def read_timeline(path: Path) -> list[dict[str, Any]]:
    """The events of a timeline that is as the format says; its slices lie in each other or beside each other."""
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    for event in events:
        required = REQUIRED[event["ph"]]
        assert event.keys() == required.keys()
        assert all(isinstance(event[name], kind) for name, kind in required.items())
        assert event["pid"] > 0
        assert event["tid"] > 0
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
        else:
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert named == {(event["pid"], event["tid"]) for event in events if event["ph"] == "X"}
    assert {event["pid"] for event in events if event["name"] == "process_name"} == {event["pid"] for event in events}
    list(nested(events))
    return events


def start_and_end(event: dict[str, Any]) -> tuple[int, int]:
    """In nanoseconds, which unlike microseconds are whole numbers: sums of them are exact."""
    start = round(event["ts"] * 1000)
    return start, start + round(event["dur"] * 1000)


def nested(events: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The slices, thread by thread, each with how many others it lies in.

    Raises:
        AssertionError: two slices of a thread overlap, and neither lies in the other.
    """

    slices = [event for event in events if event["ph"] == "X"]
    around: list[dict[str, Any]] = []
    for each in sorted(slices, key=lambda each: (each["pid"], each["tid"], each["ts"], -each["dur"])):
        start, end = start_and_end(each)
        around = [outer for outer in around if outer["tid"] == each["tid"] and start_and_end(outer)[1] > start]
        assert all(start_and_end(outer)[1] >= end for outer in around), f"{each} overlaps another"
        yield len(around), each
        around.append(each)


def drawn(events: list[dict[str, Any]]) -> str:
    """The picture as text: threads, and under them their slices, indented by what they lie in."""
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    lines = []
    for depth, each in nested(events):
        if threads.get(each["tid"]):
            lines.append(threads.pop(each["tid"]))
        lines.append(f"{'  ' * (depth + 1)}{each['cat']}: {each['name']}")
    return "\n".join(lines)


def x(name: str, ts: float, dur: float, **others: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": "op", "ts": ts, "dur": dur, "pid": 1, "tid": 1, "args": {}} | others


def m(name: str, **others: Any) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": 1, "tid": 1, "args": {"name": "a name"}} | others


NAMES = [m("process_name"), m("thread_name")]


def test_the_check_admits_what_is_right(tmp_path):
    path = tmp_path / "timeline.json"
    events = [*NAMES, m("thread_name", tid=2), x("outer", 0.0, 9.0), x("inner", 1.0, 8.0), x("other", 1.0, 9.0, tid=2)]
    path.write_text(json.dumps({"traceEvents": events}))
    assert [depth for depth, _ in nested(read_timeline(path))] == [0, 1, 0]


@pytest.mark.parametrize(
    "events",
    [
        [*NAMES, {"ph": "X"}],
        [*NAMES, x("negative", 1.0, -1.0)],
        [*NAMES, x("no number", 1.0, "2.0")],
        [*NAMES, x("no arguments", 1.0, 2.0, args=None)],
        [*NAMES, x("nameless thread", 1.0, 2.0, tid=2)],
        [*NAMES, x("the idle task's", 1.0, 2.0, tid=0), m("thread_name", tid=0)],
        [m("thread_name"), x("nameless process", 1.0, 2.0)],
        [*NAMES, x("one", 1.0, 2.0), x("overlapping", 2.999, 2.0)],
    ],
)
def test_the_check_can_fail(tmp_path, events):
    path = tmp_path / "timeline.json"
    path.write_text(json.dumps({"traceEvents": events}))
    with pytest.raises(AssertionError):
        read_timeline(path)


@pytest.fixture
def layer(define_ir_op, define_opaque):
    """An opaque op in another, with an IR op at every depth."""

    def draw_scale(x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor

    scale = define_ir_op(draw_scale, name="draw_scale")

    def draw_inner(x: Tensor) -> Tensor:
        return scale(x) + 1

    inner = define_opaque(draw_inner, name="draw_inner")

    def draw_outer(x: Tensor) -> Tensor:
        return scale(inner(x), 3.0)

    return define_opaque(draw_outer, name="draw_outer")


def traced(trace: dc.Trace) -> dc.DispatchCompileMode:
    return dc.DispatchCompileMode(config=EAGER, trace=trace)


def test_slices_lie_in_each_other_as_the_calls_did(layer, tmp_path):
    trace = dc.Trace()
    with traced(trace):
        layer(torch.ones(4, 3))
        layer(torch.ones(5, 3))
    events = read_timeline(trace.to_perfetto(tmp_path / "timeline.json"))
    assert_expected_inline(
        drawn(events),
        """\
thread 0
  op: dispatch_compile_test::draw_outer
    op: dispatch_compile_test::draw_inner
      ir_op: dispatch_compile::draw_scale
        compile: compile dispatch_compile::draw_scale
    ir_op: dispatch_compile::draw_scale
      compile: compile dispatch_compile::draw_scale
  op: dispatch_compile_test::draw_outer
    op: dispatch_compile_test::draw_inner
      ir_op: dispatch_compile::draw_scale
    ir_op: dispatch_compile::draw_scale""",
    )


def test_every_op(layer, tmp_path):
    trace = dc.Trace(all_ops=True)
    with traced(trace):
        layer(torch.ones(4, 3))
    events = read_timeline(trace.to_perfetto(tmp_path / "timeline.json"))
    assert_expected_inline(
        drawn(events),
        """\
thread 0
  op: aten::ones
  op: dispatch_compile_test::draw_outer
    op: dispatch_compile_test::draw_inner
      ir_op: dispatch_compile::draw_scale
        compile: compile dispatch_compile::draw_scale
      op: aten::add.Tensor
    ir_op: dispatch_compile::draw_scale
      compile: compile dispatch_compile::draw_scale""",
    )


def test_times_are_those_of_the_trace(layer, tmp_path):
    trace = dc.Trace()
    with traced(trace):
        layer(torch.ones(4, 3))
    events = read_timeline(trace.to_perfetto(tmp_path / "timeline.json"))
    slices = [event for event in events if event["ph"] == "X"]
    origin = trace.calls[0].start
    expected = []
    for call in trace.calls:
        expected.append((call.start - origin, call.start - origin + call.nanoseconds))
        if isinstance(call, dc.TraceEvent) and call.compile_start is not None:
            start = call.compile_start - origin
            expected.append((start, start + call.compile_nanoseconds))
    assert list(map(start_and_end, slices)) == expected
    assert slices[0]["ts"] == 0


def test_threads(layer, tmp_path):
    trace = dc.Trace()

    def work() -> None:
        with traced(trace):
            layer(torch.ones(4, 3))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = read_timeline(trace.to_perfetto(tmp_path / "timeline.json"))
    assert re.findall("thread .*", drawn(events)) == ["thread 0", "thread 1", "thread 2"]
    calls_of_threads = {number: [] for number in range(3)}
    for call in trace.calls:
        calls_of_threads[call.thread].append(call.op.removesuffix(".default"))
    tids = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
    slices = [event for event in events if event["ph"] == "X" and event["cat"] != "compile"]
    for number, ops in calls_of_threads.items():
        assert len(ops) == 4
        assert [each["name"] for each in slices if each["tid"] == tids[f"thread {number}"]] == ops


def test_details(define_ir_op, tmp_path):
    def draw_add(x: Tensor, number: int) -> Tensor:
        if number > 9:
            raise KeyError(number)
        return x + number

    add = define_ir_op(draw_add, name="draw_add")
    trace = dc.Trace()
    with traced(trace):
        add(torch.ones(4, 3), 1)
        add(torch.ones(4, 3), 2)
        add(torch.ones(4, 3, requires_grad=True), 1)
        with pytest.raises(KeyError):
            add(torch.ones(4, 3), 10)
    events = read_timeline(trace.to_perfetto(tmp_path / "timeline.json"))
    lines = [f"{event['name']}: {json.dumps(event['args'])}" for event in events if event["ph"] == "X"]
    assert_expected_inline(
        "\n".join(lines),
        """\
dispatch_compile::draw_add: {"arguments": "t: f32[4, 3], 1", "result": "t: f32[4, 3]", "action": "compiled", "provider": "native", "specialization": "[s0, 3]", "new": true}
compile dispatch_compile::draw_add: {"action": "compiled", "provider": "native", "specialization": "[s0, 3]", "new": true}
dispatch_compile::draw_add: {"arguments": "t: f32[4, 3], 2", "result": "t: f32[4, 3]", "action": "compiled", "provider": "native", "specialization": "[s0, 3]", "new": true, "difference": "number is 2, was 1"}
compile dispatch_compile::draw_add: {"action": "compiled", "provider": "native", "specialization": "[s0, 3]", "new": true, "difference": "number is 2, was 1"}
dispatch_compile::draw_add: {"arguments": "t: f32[4, 3], 1", "result": "t: f32[4, 3]", "action": "aside", "reason": "x requires grad and grad mode is on", "provider": "native", "new": false}
dispatch_compile::draw_add: {"arguments": "t: f32[4, 3], 10", "result": "raised", "action": "eager", "reason": "the call ended in KeyError", "provider": "native", "new": false}
compile dispatch_compile::draw_add: {"action": "eager", "reason": "the call ended in KeyError", "provider": "native", "new": false}""",  # noqa: E501 - a line shows all that there is
    )


def test_call_sites(layer, tmp_path):
    trace = dc.Trace(stacks=True)
    with traced(trace):
        layer(torch.ones(4, 3))
    events = read_timeline(trace.to_perfetto(tmp_path / "timeline.json"))
    sites = [event["args"]["stack"][-1] for event in events if event["ph"] == "X" and event["cat"] != "compile"]
    assert [re.sub(r".*/(.*):\d+", r"\1", site) for site in sites] == [
        "test_perfetto.py in test_call_sites",
        "test_perfetto.py in draw_outer",
        "test_perfetto.py in draw_inner",
        "test_perfetto.py in draw_outer",
    ]


def test_a_call_that_has_not_ended(layer, define_opaque, tmp_path):
    trace, path = dc.Trace(), tmp_path / "timeline.json"

    def draw_itself(x: Tensor) -> Tensor:
        y = layer(x)
        trace.to_perfetto(path)
        return y + 0

    opaque = define_opaque(draw_itself, name="draw_itself")
    with traced(trace):
        opaque(torch.ones(4, 3))
    slices = [event for event in read_timeline(path) if event["ph"] == "X"]
    assert [each["name"] for each in slices if each["args"].get("result") == "not finished"] == [
        "dispatch_compile_test::draw_itself"
    ]
    assert start_and_end(slices[0])[1] == max(start_and_end(each)[1] for each in slices)


def test_a_trace_that_dropped_calls(layer, tmp_path):
    trace = dc.Trace(max_events=2)
    with traced(trace):
        layer(torch.ones(4, 3))
    path = trace.to_perfetto(tmp_path / "timeline.json")
    assert drawn(read_timeline(path)).count("op: ") == 2
    assert json.loads(path.read_text())["otherData"] == {"dropped": 2}


def test_an_empty_trace(tmp_path):
    path = dc.Trace().to_perfetto(tmp_path / "timeline.json")
    assert [event["name"] for event in read_timeline(path)] == ["process_name"]


def test_a_loaded_trace_gives_the_same_timeline(layer, tmp_path):
    trace = dc.Trace(ids=True)
    with traced(trace):
        layer(torch.ones(4, 3))
    loaded = dc.Trace.load(trace.save(tmp_path / "trace.jsonl"))
    timelines = [each.to_perfetto(tmp_path / name).read_bytes() for name, each in (("a", trace), ("b", loaded))]
    assert timelines[0] == timelines[1]


def test_a_path_that_cannot_be_written(tmp_path):
    path = tmp_path / "missing" / "timeline.json"
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        dc.Trace().to_perfetto(path)
