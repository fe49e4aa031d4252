"""Errors that only the values in a tensor can cause reach the caller as eager raises them."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

import dispatch_compile as dc


def test_an_index_out_of_range_raises_eagers_error(define_ir_op):
    def rows(x: Tensor, table: Tensor) -> Tensor:
        return torch.nn.functional.embedding(x, table) * 2

    op = define_ir_op(rows)
    table = torch.randn(8, 4)
    good, bad = torch.arange(3), torch.tensor([0, 99, 1])
    mode = dc.DispatchCompileMode(trace=True)
    with pytest.raises(IndexError) as eager:
        op(bad, table)
    for first, second in [(good, bad), (bad, good)]:
        mode.cache.clear()
        for ids in (first, second):
            if ids is good:
                with mode:
                    torch.testing.assert_close(op(ids, table), table[:3] * 2)
            else:
                with pytest.raises(IndexError) as compiled, mode:
                    op(ids, table)
                assert str(compiled.value) == str(eager.value)
    assert mode.cache.stats().hits == 2


def test_code_that_raises_where_the_op_does_not_is_said_to(define_ir_op, caplog):
    def shifted(x: Tensor) -> Tensor:
        return x + 1

    op = define_ir_op(shifted)
    calls = 0

    def backend(graph, inputs):
        def run(*args):
            nonlocal calls
            calls += 1
            if calls > 1:  # the first call checks the code
                raise RuntimeError("no memory left")
            return graph(*args)

        return run

    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend=backend), trace=True)
    x = torch.randn(4, 4)
    with (
        mode,
        caplog.at_level(logging.WARNING, "dispatch_compile"),
        pytest.warns(dc.DispatchCompileWarning, match="no memory left"),
    ):
        torch.testing.assert_close(op(x), x + 1)
    [event] = mode.trace.events
    assert (event.action, event.reason) == ("eager", "its compiled code raised RuntimeError: no memory left")
    assert mode.cache.stats().fallbacks == 1
    assert "no memory left" in caplog.text


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("first_call", [False, True])
@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_code_that_raises_runs_once_and_then_the_op(first_call, trace, counted):
    runs = 0
    fails_from = 2 if first_call else 3

    def backend(graph, inputs):
        def run(*args):
            nonlocal runs
            runs += 1
            if runs >= fails_from:
                raise RuntimeError("device fault")
            return graph(*args)

        return run

    mode, x = dc.DispatchCompileMode(config=dc.CompileConfig(backend=backend), trace=trace), torch.randn(4, 4)
    with mode:
        if not first_call:
            counted(x)
        before, eagerly = runs, counted.python_runs
        torch.testing.assert_close(counted(x), x * 2 + 1)
    checked = captured = int(first_call)  # new code is tried once, and is of one capture
    assert runs - before == 1 + checked
    assert counted.python_runs - eagerly == 1 + captured
    stats = mode.cache.stats()
    assert (stats.compiles, stats.hits, stats.fallbacks) == (1, int(not first_call), 1)


@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning", "ignore:An output with one or more")
def test_an_op_that_resizes_an_argument_and_cannot_be_compiled(define_ir_op):
    def adding(xs: list[Tensor]) -> Tensor:
        torch.add(xs[0], 1, out=xs[-1])
        return xs[0] * 2

    op = define_ir_op(adding)
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", on_failure="native"))
    with mode:
        for _ in range(2):
            out = torch.zeros(2, 4)
            assert op([torch.ones(()), out]).item() == 2
            assert (out.shape, out.item()) == ((), 2)
    stats, can_be_captured = mode.cache.stats(), torch.__version__ >= "2.15"
    assert (stats.hits, stats.fallbacks, stats.asides) == ((0, 0, 2) if can_be_captured else (0, 2, 0))
