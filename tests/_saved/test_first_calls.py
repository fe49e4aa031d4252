"""First calls on many threads at once: each specialization is made once, nobody sees half of one, and whatever strikes
while one is made leaves nothing behind, no lock either."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support import EAGER, EAGER_OR_NATIVE, GatedBackend, assert_same, guarded_entries
from torch import Tensor, nn

import dispatch_compile as dc
from dispatch_compile._cache.counters import OpCounters
from dispatch_compile._cache.table import Table

pytestmark = [pytest.mark.run_once, pytest.mark.usefixtures("fake_tensors_on_the_main_thread")]

THREADS = 16


@pytest.fixture(autouse=True)
def threads_that_switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def on_threads(work: Callable[[int], Any], threads: int = THREADS) -> list[Any]:
    """``work(number)`` on so many threads, which start together; the first error is raised."""
    start = threading.Barrier(threads)

    def run(number: int) -> Any:
        start.wait()
        return work(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


@pytest.fixture
def gated() -> Iterator[GatedBackend]:
    backend = GatedBackend()
    yield backend
    backend.gate.set()


def ops_of_some_shapes(define_ir_op: Callable[..., dc.IrOp]) -> list[Callable[[], Tensor]]:
    def shifted(x: Tensor) -> Tensor:
        return x + 3

    def scaled(x: Tensor, factor: float) -> Tensor:
        return x * factor

    def joined(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    shift, scale, join = map(define_ir_op, (shifted, scaled, joined))
    calls: list[Callable[[], Tensor]] = []
    for size in (3, 5):
        for tokens in (1, 4):
            x, weight = torch.randn(tokens, size), torch.randn(size)
            calls += [
                lambda x=x: shift(x),
                lambda x=x: scale(x, 2.0),
                lambda x=x: scale(x, 3.0),
                lambda x=x, weight=weight: join(x, weight),
            ]
    return calls


def test_each_specialization_is_made_once_and_every_call_is_counted(define_ir_op):
    calls, rounds, cache = ops_of_some_shapes(define_ir_op), 3, dc.NativeCache()
    expected = [call() for call in calls]

    def work(number: int) -> None:
        with dc.DispatchCompileMode(config=EAGER, cache=cache):
            for i in range(rounds * len(calls)):
                which = (i + number) % len(calls)
                assert_same(calls[which](), expected[which])

    on_threads(work)
    total = THREADS * rounds * len(calls)
    assert cache.stats() == dc.CacheStats(compiles=len(calls), hits=total, fallbacks=0, asides=0)


def test_first_calls_through_inductor():
    mode, x = dc.DispatchCompileMode(), torch.randn(4, 34)
    calls = [lambda: dc.ops.silu_and_mul(x), lambda: dc.ops.rms_norm(x, None, 1e-6)]
    expected = [call() for call in calls]

    def work(number: int) -> None:
        with mode:
            for i in range(2 * len(calls)):
                which = (i + number) % len(calls)
                torch.testing.assert_close(calls[which](), expected[which])

    on_threads(work)
    assert mode.cache.stats() == dc.CacheStats(compiles=2, hits=4 * THREADS, fallbacks=0, asides=0)


@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_every_call_is_counted_whatever_becomes_of_it(counted, define_ir_op):
    def rolled(x: Tensor) -> Tensor:
        return x.roll(int(x.sum()))

    fails, mode, rounds = define_ir_op(rolled), dc.DispatchCompileMode(config=EAGER_OR_NATIVE), 20
    before = dc.counters()["reasons"]

    def work(number: int) -> None:
        with mode:
            for _ in range(rounds):
                counted(torch.ones(4, 3))
                fails(torch.ones(4, 3))
                counted(torch.ones(4, 3, requires_grad=True))

    on_threads(work)
    each = THREADS * rounds
    assert mode.cache.stats() == dc.CacheStats(compiles=1, hits=each, fallbacks=each, asides=each)
    assert sorted((dc.counters()["reasons"] - before).values()) == [each, each]


def test_no_count_of_a_new_reason_is_lost():
    """Another thread counts the same reason where threads may switch: where a Counter runs Python code."""
    counters = OpCounters()

    class Switching(Counter[str]):
        others = 1

        def __missing__(self, reason: str) -> int:
            if self.others:
                self.others -= 1
                counters.fell_back(reason)
            return 0

    counters.reasons = Switching()
    counters.fell_back("why")
    assert counters.reasons["why"] == counters.fallbacks


def test_calls_of_what_is_being_compiled_wait_for_it(gated, counted):
    mode, x = dc.DispatchCompileMode(config=dc.CompileConfig(backend=gated), trace=True), torch.randn(4, 3)
    expected = counted(x)

    def call() -> None:
        with mode:
            assert_same(counted(x), expected)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(call)
        assert gated.begun.wait(60)
        second = pool.submit(call)
        assert not guarded_entries(mode, counted.op), "nothing is there before it is complete"
        gated.gate.set()
        first.result()
        second.result()
    assert len(gated.threads) == 1
    assert [event.new for event in mode.trace.events] == [True, False]


def test_what_is_compiled_already_does_not_wait_for_what_is_being_compiled(gated, counted):
    mode, x = dc.DispatchCompileMode(config=dc.CompileConfig(backend=gated)), torch.randn(4, 3)

    def call_with(argument: Tensor) -> None:
        with mode:
            counted(argument)

    gated.gate.set()
    call_with(x)
    gated.gate.clear()
    gated.begun.clear()
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(call_with, x.double())
        assert gated.begun.wait(60)
        pool.submit(call_with, x).result(timeout=60)  # through its guard
        pool.submit(call_with, nn.Parameter(x, requires_grad=False)).result(timeout=60)  # through its key
        assert not slow.done()
        gated.gate.set()
        slow.result()
    assert mode.cache.stats() == dc.CacheStats(compiles=2, hits=4, fallbacks=0, asides=0)


def test_guards_added_at_once_are_all_kept(counted, monkeypatch):
    """One thread stops where it is about to put its guard in front of those that it has read."""
    mode = dc.DispatchCompileMode(config=EAGER)
    put, stopped, go_on = Table._guard_with, threading.Event(), threading.Event()

    def stopping(table: Table, guarded: tuple[Any, ...]) -> None:
        if not stopped.is_set():
            stopped.set()
            assert go_on.wait(60)
        put(table, guarded)

    monkeypatch.setattr(Table, "_guard_with", stopping)

    def call(x: Tensor) -> None:
        with mode:
            counted(x)

    first, second = (threading.Thread(target=call, args=[torch.ones(tokens, 3)]) for tokens in (1, 4))
    first.start()
    assert stopped.wait(60)
    second.start()
    second.join(0.5)
    go_on.set()
    first.join()
    second.join()
    assert len(guarded_entries(mode, counted.op)) == 2


# ---- Calls inside of what is being compiled


def test_natives_that_call_ops_on_many_threads(define_ir_op, define_opaque):
    """One calls another IR op; one calls an opaque op, in whose body a mode of its own compiles an IR op."""
    inner_mode = dc.DispatchCompileMode(config=EAGER)

    def inner(x: Tensor) -> Tensor:
        return x * 2

    inner_op = define_ir_op(inner)

    def opaque(x: Tensor) -> Tensor:
        with inner_mode:
            return inner_op(x) + 1

    opaque_op = define_opaque(opaque, fake=torch.empty_like)

    def calls_ir_op(x: Tensor) -> Tensor:
        return inner_op(x) + 5

    def calls_opaque_op(x: Tensor) -> Tensor:
        return opaque_op(x) + 7

    ops = [define_ir_op(calls_ir_op), define_ir_op(calls_opaque_op), inner_op]
    mode, arguments = dc.DispatchCompileMode(config=EAGER), [torch.randn(1, 3), torch.randn(4, 3)]
    expected = {(op, x): op(x) for op in ops for x in arguments}
    calls = list(expected)

    def work(number: int) -> None:
        with mode:
            for i in range(len(calls)):
                op, x = calls[(i + number) % len(calls)]
                assert_same(op(x), expected[op, x])

    on_threads(work)
    assert mode.cache.stats().compiles == len(calls)
    assert mode.cache.stats().fallbacks == mode.cache.stats().asides == 0
    assert inner_mode.cache.stats().compiles == len(arguments)


# ---- Errors while it is made


class Once:
    """Something to call that raises the first time."""

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error

    def __call__(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error


def failing_in_the_backend(once: Once, define_ir_op: Callable[..., dc.IrOp]) -> tuple[dc.IrOp, dc.CompileConfig]:
    def plain(x: Tensor) -> Tensor:
        return x * 2

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> torch.fx.GraphModule:
        once()
        return graph

    return define_ir_op(plain), dc.CompileConfig(backend=backend)


def failing_in_the_implementation(once: Once, define_ir_op: Callable[..., dc.IrOp]) -> tuple[dc.IrOp, dc.CompileConfig]:
    def interrupted(x: Tensor) -> Tensor:
        once()
        return x * 2

    return define_ir_op(interrupted), EAGER


@pytest.mark.parametrize("failing", [failing_in_the_backend, failing_in_the_implementation])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_leaves_nothing_behind(error, failing, define_ir_op):
    op, config = failing(Once(error()), define_ir_op)
    mode, x = dc.DispatchCompileMode(config=config), torch.randn(4, 3)
    with mode:
        with pytest.raises(error):
            op(x)
        assert not guarded_entries(mode, op)
        assert mode.cache.stats() == dc.CacheStats(compiles=0, hits=0, fallbacks=0, asides=0)

    def call() -> None:
        with mode:
            assert_same(op(x), x * 2)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result(timeout=60)  # on another thread: no lock is held
    call()
    assert mode.cache.stats() == dc.CacheStats(compiles=1, hits=2, fallbacks=0, asides=0)


def test_failures_on_many_threads_at_once(define_ir_op):
    def rolled(x: Tensor) -> Tensor:
        return x.roll(int(x.sum()))

    op, mode = define_ir_op(rolled), dc.DispatchCompileMode(config=EAGER)

    def work(number: int) -> None:
        with mode, pytest.raises(dc.CompileError, match="cannot be captured"):
            op(torch.ones(4))

    on_threads(work)
    assert mode.cache.stats().fallbacks == THREADS


# ---- A cache that is cleared


def test_what_is_being_compiled_when_the_cache_is_cleared_is_not_kept(gated, counted):
    mode, x = dc.DispatchCompileMode(config=dc.CompileConfig(backend=gated)), torch.randn(4, 3)

    def call() -> None:
        with mode:
            assert_same(counted(x), x * 2 + 1)

    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(call)
        assert gated.begun.wait(60)
        mode.cache.clear()
        gated.gate.set()
        under_way.result()
    assert len(mode.cache) == 0
    for _ in range(2):
        call()
    assert (mode.cache.stats().compiles, len(mode.cache)) == (2, 1)
