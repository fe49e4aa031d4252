"""A mode is on the thread that entered it and on no other: workers, autograd's threads, other threads' loops, tasks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from shipped import IN_LIBRARY_OP, SHIPPED, OpaqueOps
from support import EAGER, assert_same, outcome
from torch import Tensor

import dispatch_compile as dc

pytestmark = pytest.mark.usefixtures("fake_tensors_on_the_main_thread")


@pytest.fixture
def mode() -> dc.DispatchCompileMode:
    return dc.DispatchCompileMode(config=EAGER)


def on_another_thread(fn: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(fn).result()


# ---- Threads beside a mode


def test_threads_without_a_mode_while_one_thread_is_in_it(mode):
    """Every op that ships, called on four threads at the same time; only the calls of one of them are caught."""
    opaque_ops, rounds, threads = OpaqueOps(), 20, 4
    calls = {name: opaque_ops.call(name, IN_LIBRARY_OP) for name in SHIPPED}
    arguments = {name: shipped.make_args(torch.float32) for name, shipped in SHIPPED.items()}
    expected = {name: call(*arguments[name]) for name, call in calls.items()}
    start = threading.Barrier(threads)

    def work() -> None:
        start.wait()
        for _ in range(rounds):
            for name, call in calls.items():
                assert_same(call(*arguments[name]), expected[name])

    def work_in_the_mode() -> None:
        with mode:
            work()

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work_in_the_mode), *(pool.submit(work) for _ in range(threads - 1))]:
            future.result()
    opaque_ops.destroy()
    # Two overloads share an implementation, and so its code.
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (len(dc.ops.__all__), len(SHIPPED) * rounds)


MODES_COME_AND_GO = """
import threading, time
from concurrent.futures import ThreadPoolExecutor
import torch
import dispatch_compile as dc

x, stop = torch.randn(4, 16), threading.Event()
expected = dc.ops.silu_and_mul(x)
# TorchScript calls the op without holding the interpreter's lock, as C++ programs do.
calls = torch.jit.CompilationUnit('''
def run(x: Tensor, n: int) -> Tensor:
    y = x
    for i in range(n):
        y = torch.ops.dispatch_compile.silu_and_mul(x)
    return y
''')

def work():
    while not stop.is_set():
        try:
            assert torch.equal(calls.run(x, 50), expected)
        except RuntimeError as error:  # torch itself, seldom: the call found the kernel's place just emptied
            assert "fallthrough_kernel" in str(error), error

with ThreadPoolExecutor(2) as pool:
    futures = [pool.submit(work) for _ in range(2)]
    for _ in range(500):
        mode = dc.DispatchCompileMode(ops=[dc.ops.silu_and_mul])
        time.sleep(0.0005)
        del mode
        if any(future.done() for future in futures):
            break
    stop.set()
    for future in futures:
        future.result()
"""


def test_modes_that_come_and_go_beside_threads_without_one():
    """The last mode's hooks leave the dispatch table while other threads call the op. In a process of its own, which
    may crash."""
    run = subprocess.run(
        [sys.executable, "-c", MODES_COME_AND_GO],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_workers_do_not_see_the_mode_of_the_thread_that_hands_them_work(mode, counted):
    x = torch.randn(4, 3)
    with ThreadPoolExecutor(2) as pool:
        with mode:
            results = list(pool.map(counted, [x] * 4))
            submitted = pool.submit(counted, x)
        assert_same([*results, submitted.result()], [counted(x)] * 5)
    assert mode.cache.stats().hits == 0


def test_workers_that_enter_one_mode_share_its_code(mode, counted):
    def work(x: Tensor) -> Tensor:
        with mode:
            return counted(x)

    inputs = [torch.randn(tokens, 3) for tokens in range(2, 18)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, inputs))
        assert_same(results, [counted(x) for x in inputs])
        pool.submit(counted, inputs[0]).result()  # a worker is out of the mode when its work is done
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, len(inputs))


def test_an_exception_in_a_worker_leaves_the_mode(mode, counted):
    def fail() -> None:
        with mode:
            counted(torch.randn(4, 3))
            raise KeyError("work")

    with ThreadPoolExecutor(1) as pool:
        assert str(pool.submit(outcome, fail).result()) == "'work'"
        runs = counted.python_runs
        pool.submit(counted, torch.randn(4, 3)).result()
    assert counted.python_runs == runs + 1


# ---- Autograd


class ScaledGradient(torch.autograd.Function):
    """The identity, whose backward hands the gradient through an op."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.op = op
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.op(gradient.contiguous()), None


def gradient_through(op: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(ScaledGradient.apply(leaf, op).square().sum(), leaf)
    return gradient


def test_backward_is_in_the_mode_of_the_thread_that_calls_it(mode, counted):
    leaf = torch.randn(4, 3, requires_grad=True)
    expected = gradient_through(counted, leaf)
    with mode:
        assert_same(gradient_through(counted, leaf), expected)
    assert mode.cache.stats().hits == 1


@pytest.mark.parametrize(("forward_in_mode", "hits"), [(True, 0), (False, 1)])
def test_backward_does_not_inherit_the_mode_of_forward(forward_in_mode, hits, mode, counted):
    leaf = torch.randn(4, 3, requires_grad=True)
    expected = gradient_through(counted, leaf)

    def forward() -> Tensor:
        return ScaledGradient.apply(leaf, counted).square().sum()

    def backward(loss: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient

    if forward_in_mode:
        with mode:
            loss = forward()
        gradient = backward(loss)
    else:
        loss = forward()
        with mode:
            gradient = backward(loss)
    assert_same(gradient, expected)
    assert mode.cache.stats().hits == hits


def test_backward_that_another_thread_calls_is_not_in_the_mode(mode, counted):
    leaf = torch.randn(4, 3, requires_grad=True)
    expected = gradient_through(counted, leaf)
    with mode:
        assert_same(on_another_thread(lambda: gradient_through(counted, leaf)), expected)
    assert mode.cache.stats().hits == 0


def test_backward_on_many_threads(mode, counted):
    """Threads of which every other one is in the mode differentiate with respect to the same leaf."""
    leaf = torch.randn(4, 3, requires_grad=True)
    expected, start = gradient_through(counted, leaf), threading.Barrier(4)

    def inside() -> Tensor:
        with mode:
            return gradient_through(counted, leaf)

    def outside() -> Tensor:
        return gradient_through(counted, leaf)

    def repeated(run: Callable[[], Tensor]) -> list[Tensor]:
        start.wait()
        return [run() for _ in range(25)]

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(repeated, run) for run in (inside, outside, inside, outside)]
        for future in futures:
            assert_same(future.result(), [expected] * 25)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 50)


def test_backwards_that_nest_so_deep_that_autograd_takes_another_thread(mode, counted):
    """Autograd runs a backward inside a backward on the same thread, but only so many of them."""
    depth, threads = 100, []

    def nested(level: int) -> Callable[[Tensor], Tensor]:
        def op(gradient: Tensor) -> Tensor:
            threads.append(threading.get_ident())
            if level:
                leaf = torch.ones(2, 3, requires_grad=True)
                with torch.enable_grad():
                    gradient = gradient + gradient_through(nested(level - 1), leaf)
            return counted(gradient.detach())

        return op

    leaf = torch.ones(2, 3, requires_grad=True)
    expected = gradient_through(nested(depth), leaf)
    threads.clear()
    with mode:
        assert_same(gradient_through(nested(depth), leaf), expected)
    on_this_thread = threads.count(threading.get_ident())
    assert 0 < on_this_thread < depth
    assert mode.cache.stats().hits == on_this_thread


# ---- The number of threads that an op runs on


@pytest.fixture
def number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_another_number_of_threads_is_another_specialization(backend, number_of_threads):
    """Inductor writes the number into the code for a CPU."""
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend=backend))
    x = torch.randn(64, 256)
    compiles = []
    for n in (1, 2, 1, 2):
        torch.set_num_threads(n)
        expected = dc.ops.silu_and_mul(x)
        with mode:
            torch.testing.assert_close(dc.ops.silu_and_mul(x), expected)
            assert torch.get_num_threads() == n
        compiles.append(mode.cache.stats().compiles)
    assert compiles == [1, 2, 2, 2]
    with mode:
        torch.set_num_threads(1)
        dc.ops.silu_and_mul(x)
    assert torch.get_num_threads() == 1, "what is set inside stays set"
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (2, 5)
