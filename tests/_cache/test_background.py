"""Compiling in the background: calls run eagerly meanwhile, and compiled from the moment that it is done."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from support import GatedBackend, assert_same
from torch import Tensor

import dispatch_compile as dc


@pytest.fixture
def backend():
    backend = GatedBackend()
    yield backend
    backend.gate.set()


def background(backend, **options) -> dc.DispatchCompileMode:
    config = dc.CompileConfig(backend=backend, on_new="background", **options)
    return dc.DispatchCompileMode(config=config, trace=True)


def told(mode: dc.DispatchCompileMode) -> list[tuple[str, str | None]]:
    return [(event.action, event.reason) for event in mode.trace.events]


MEANWHILE = ("eager", "is being compiled in the background")


def test_calls_run_eagerly_until_it_is_compiled(backend, counted):
    mode, x = background(backend), torch.randn(4, 3)
    expected = counted(x)
    with mode:
        assert_same(counted(x), expected)
        assert backend.begun.wait(60)
        assert_same(counted(x), expected)
        backend.gate.set()
        assert mode.cache.wait(60)
        assert_same(counted(x), expected)
        assert_same(counted(torch.cat([x, x])), torch.cat([expected, expected]))
    assert told(mode) == [MEANWHILE, MEANWHILE, ("compiled", None), ("compiled", None)]
    assert mode.cache.stats() == dc.CacheStats(compiles=1, hits=2, fallbacks=2, asides=0)
    assert threading.current_thread() not in backend.threads


def test_other_specializations_are_served_meanwhile(backend, counted):
    mode, x = background(backend), torch.randn(4, 3)
    backend.gate.set()
    with mode:
        counted(x)
        mode.cache.wait(60)
        backend.gate.clear()
        counted(x.double())
        counted(x)
    assert [action for action, _ in told(mode)] == ["eager", "eager", "compiled"]


def test_the_callers_tensors_are_not_kept(backend, counted):
    import weakref

    mode, x = background(backend), torch.randn(4, 3)
    with mode:
        counted(x)
    assert backend.begun.wait(60)
    reference = weakref.ref(x)
    del x
    mode.trace.clear()
    assert reference() is None


@pytest.mark.parametrize("inference", [True, False])
def test_compiles_in_the_callers_inference_mode(inference, backend, counted):
    mode = background(backend)
    backend.gate.set()
    with torch.inference_mode(inference), mode:
        counted(torch.ones(4, 3))
        assert mode.cache.wait(60)
        counted(torch.ones(4, 3))
    assert mode.cache.stats().hits == 1


def failing(graph, inputs):
    raise ValueError("no such luck")


def test_a_failure_is_raised_by_the_next_call(counted):
    mode, x = background(failing, on_failure="raise"), torch.randn(4, 3)
    with mode:
        counted(x)
        assert mode.cache.wait(60)
        for _ in range(2):
            with pytest.raises(dc.CompileError, match="no such luck"):
                counted(x)


def test_a_failure_is_warned_of_once_where_calls_are_to_go_on(counted):
    mode, x = background(failing), torch.randn(4, 3)
    with mode:
        counted(x)
        assert mode.cache.wait(60)
        with pytest.warns(dc.DispatchCompileWarning, match="no such luck"):
            assert_same(counted(x), x * 2 + 1)
        assert_same(counted(x), x * 2 + 1)  # a second warning would be an error
    assert mode.cache.stats().fallbacks == 3


def test_warming_up_waits(backend, counted):
    mode = background(backend)
    backend.gate.set()
    made = mode.warmup(counted.op, torch.randn(4, 3), tokens=[1, 4])
    assert [event.action for event in made] == ["compiled", "compiled"]
    with mode:
        counted(torch.randn(7, 3))
    assert told(mode) == [("compiled", None)]


def test_what_nobody_needs_any_more_is_not_compiled(define_ir_op):
    def forgotten(x: Tensor) -> Tensor:
        return x * 3

    op, mode = define_ir_op(forgotten), background("eager")
    with mode:
        op(torch.ones(4, 3))
        mode.cache.clear()
        assert mode.cache.wait(60)
        op(torch.ones(4, 3))
        assert mode.cache.wait(60)
        op(torch.ones(4, 3))
    assert [action for action, _ in told(mode)][-1] == "compiled"


EXITS = """
import time, torch, dispatch_compile as dc

def slow(graph, inputs):
    print("compiling", flush=True)
    time.sleep(600)

mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend=slow, on_new="background"))
with mode:
    for tokens in (1, 4):
        print(dc.ops.silu_and_mul(torch.ones(tokens, 4)).shape, flush=True)
time.sleep(2)
print("leaving", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="breaks off a sleep by a signal to the thread")
def test_the_interpreter_exits_while_something_is_compiled():
    run = subprocess.run([sys.executable, "-c", EXITS], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert "leaving" in run.stdout
