"""Named ranges in torch.profiler: one for each intercepted call, and nothing of them without a profiler."""

from __future__ import annotations

import pytest
import torch
from support import EAGER, EAGER_OR_NATIVE
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import dispatch_compile as dc


def ranges(run) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    return {row.key: row.count for row in profiled.key_averages() if row.key.startswith("dispatch_compile::")}


def of(op: dc.IrOp, what: str) -> str:
    return f"dispatch_compile::dispatch_compile.{op.name} {what}"


def test_one_range_for_each_call_named_after_its_specialization(counted):
    mode = dc.DispatchCompileMode(config=EAGER)

    def run() -> None:
        for tokens in (4, 1, 5, 1, 6):
            counted(torch.ones(tokens, 3))

    with mode:
        first, warm = ranges(run), ranges(run)
    names = {of(counted.op, "compiled native [s0, 3]"): 3, of(counted.op, "compiled native [1, 3]"): 2}
    assert {name: count for name, count in first.items() if name in names} == names
    assert {name: count for name, count in warm.items() if "[" in name} == names
    assert mode.cache.stats().hits == 10


def test_the_code_runs_inside_the_range(define_ir_op):
    def shifted(x: Tensor) -> Tensor:
        return x.roll(1, 0)

    op, x = define_ir_op(shifted), torch.ones(4, 3)
    mode = dc.DispatchCompileMode(config=EAGER)
    with mode:
        op(x)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            op(x)
    [ours] = [event for event in profiled.events() if event.name == of(op, "compiled native [s0, 3]")]
    [roll] = [event for event in profiled.events() if event.name == "aten::roll"]
    assert ours.time_range.start <= roll.time_range.start <= roll.time_range.end <= ours.time_range.end


@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_native_calls_have_a_range_too(define_ir_op):
    def noise(x: Tensor) -> Tensor:
        return x + torch.rand_like(x)

    op, mode = define_ir_op(noise), dc.DispatchCompileMode(config=EAGER_OR_NATIVE)
    with mode:
        op(torch.ones(3))
        assert ranges(lambda: op(torch.ones(3)))[of(op, "aside native")] == 1


def test_calls_that_step_aside_for_their_arguments_have_one(counted):
    with dc.DispatchCompileMode(config=EAGER):
        found = ranges(lambda: counted(torch.ones(3, requires_grad=True)))
    assert found[of(counted.op, "aside native")] == 1


def test_traced_calls_have_ranges(counted):
    with dc.DispatchCompileMode(config=EAGER, trace=True) as mode:
        counted(torch.ones(4, 3))
        assert ranges(lambda: counted(torch.ones(4, 3)))[of(counted.op, "compiled native [s0, 3]")] == 1
    assert len(mode.trace) == 2


def test_without_a_profiler_no_range_is_made(counted, monkeypatch):
    def fail(*args: object) -> None:
        raise AssertionError("made a range without a profiler")

    with dc.DispatchCompileMode(config=EAGER) as mode:
        counted(torch.ones(4, 3))
        monkeypatch.setattr("dispatch_compile._call.route.in_profiler_range", fail)
        counted(torch.ones(4, 3))
        counted(torch.ones(1, 3))
    assert mode.cache.stats().hits == 3
