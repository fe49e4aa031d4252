"""One switch for the whole process: every thread and task that is in no mode of its own is in the mode."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import EAGER, GatedBackend, assert_same
from torch import Tensor

import dispatch_compile as dc

pytestmark = [pytest.mark.selective, pytest.mark.usefixtures("fake_tensors_on_the_main_thread")]

X = torch.ones(4, 3)


@pytest.fixture(autouse=True)
def disabled_afterwards():
    yield
    dc.disable()


def hits(mode: dc.DispatchCompileMode) -> int:
    return mode.cache.stats().hits


def test_on_every_thread_also_those_that_start_later(counted):
    running, go_on = threading.Event(), threading.Event()

    def call_later() -> Tensor:
        running.set()
        assert go_on.wait(60)
        return counted(X)

    expected = counted(X)
    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(call_later)
        assert running.wait(60)
        mode = dc.enable(config=EAGER)
        go_on.set()
        results = [early.result(), pool.submit(counted, X).result(), counted(X)]
    thread = threading.Thread(target=lambda: results.append(counted(X)))
    thread.start()
    thread.join()
    assert_same(results, [expected] * 4)
    assert (mode.cache.stats().compiles, hits(mode)) == (1, 4)
    dc.disable()
    assert_same(counted(X), expected)
    assert hits(mode) == 4


def test_warm_calls_take_the_short_cut(counted, monkeypatch):
    mode = dc.enable(config=EAGER)
    counted(X)
    monkeypatch.setattr("dispatch_compile._call.kernel._intercept", None)
    counted(X)
    assert hits(mode) == 2


def test_a_mode_of_the_threads_own_takes_its_place(counted, define_ir_op):
    def other(x: Tensor) -> Tensor:
        return x + 3

    op = define_ir_op(other)
    enabled = dc.enable(config=EAGER, trace=True)
    with dc.DispatchCompileMode(config=EAGER, ops=[counted.op]) as own:
        counted(X)
        op(X)  # the mode that is entered leaves it out, and the other is not around it
        with dc.DispatchCompileMode(config=EAGER, ops=[op]) as inner:
            op(X)
            counted(X)
    assert (hits(own), hits(inner), hits(enabled), len(enabled.trace)) == (2, 1, 0, 0)
    counted(X)
    assert (hits(enabled), len(enabled.trace)) == (1, 1)


def test_in_opaque_ops_and_around_bare_bodies(counted, define_opaque):
    @dc.compile_natives
    def body(x: Tensor) -> Tensor:
        return counted(x)

    op = define_opaque(body)
    mode = dc.enable(config=EAGER)
    op(X)
    assert hits(mode) == 1


def test_tasks(counted):
    own, enabled = dc.DispatchCompileMode(config=EAGER), dc.enable(config=EAGER)

    async def task(mode: dc.DispatchCompileMode | None) -> None:
        await asyncio.sleep(0)
        counted(X)
        if mode is not None:
            with mode:
                await asyncio.sleep(0)
                counted(X)
        counted(X)

    async def main() -> None:
        await asyncio.gather(*(task(mode) for mode in (own, None, own, None)))

    asyncio.run(main())
    assert (hits(own), hits(enabled)) == (2, 8)


def test_ops_that_come_later_are_caught(define_ir_op):
    def later(x: Tensor) -> Tensor:
        return x * 2

    mode = dc.enable(config=EAGER)
    define_ir_op(later)(X)
    assert hits(mode) == 1


def test_work_that_takes_modes_along_takes_those_that_were_entered(counted):
    mode = dc.enable(config=EAGER)
    work = dc.inherit_modes(counted)
    dc.disable()
    work(X)
    assert hits(mode) == 0


def test_the_compilers_own_calls_are_not_caught(define_ir_op):
    def inner(x: Tensor) -> Tensor:
        return x * 2

    inner_op = define_ir_op(inner)

    def outer(x: Tensor) -> Tensor:
        return x + 1

    def backend(graph, inputs):
        inner_op(torch.ones(2))
        return graph

    op, mode = define_ir_op(outer), dc.enable(config=dc.CompileConfig(backend=backend), trace=True)
    op(X)
    assert [event.op for event in mode.trace.events] == [f"{op.torch_op._schema.name}.default"]


def test_compiling_in_the_background(counted):
    backend = GatedBackend()
    mode = dc.enable(config=dc.CompileConfig(backend=backend, on_new="background"))
    counted(X)
    backend.gate.set()
    assert mode.cache.wait(60)
    counted(X)
    assert (mode.cache.stats().fallbacks, hits(mode)) == (1, 1)


def test_which_mode(counted):
    mode = dc.DispatchCompileMode(config=EAGER)
    assert dc.enable(mode) is mode
    assert dc.enable(mode) is mode
    assert dc.enable() is mode
    for arguments in ({"mode": dc.DispatchCompileMode()}, {"config": EAGER}, {"trace": True}):
        with pytest.raises(RuntimeError, match=r"another mode is enabled; call disable\(\) first"):
            dc.enable(**arguments)
    dc.disable()
    dc.disable()
    assert dc.enable(config=EAGER) is not mode


def test_arguments_that_make_no_sense():
    mode = dc.DispatchCompileMode(config=EAGER)
    with pytest.raises(TypeError, match="mode must be a DispatchCompileMode, not CompileConfig"):
        dc.enable(EAGER)
    with pytest.raises(TypeError, match=r"give a mode, or arguments for a new one \(config, trace\), not both"):
        dc.enable(mode, config=EAGER, trace=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tracing'"):
        dc.enable(tracing=True)
    with pytest.raises(ValueError, match=r"Trace\(all_ops=True\) is for the thread that enters the mode"):
        dc.enable(trace=dc.Trace(all_ops=True))
    assert dc._dispatch.active.mode_everywhere() is None


def test_disabled_it_is_let_go_of(counted):
    mode = dc.enable(config=EAGER)
    counted(X)
    reference = weakref.ref(mode)
    del mode
    gc.collect()
    assert reference() is not None
    dc.disable()
    gc.collect()
    assert reference() is None
