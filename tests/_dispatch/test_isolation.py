"""Two engines in one process, with different configurations, priorities and providers: neither gets the other's code,
results or counts, whichever thread they run on."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support import EAGER, assert_same, specializations
from torch import Tensor

import dispatch_compile as dc
from dispatch_compile._torch.dispatch import has_kernel

X = torch.arange(12.0).reshape(4, 3)


def adding(number: float) -> Callable[..., Any]:
    """A backend whose code adds ``number`` to what it should give, so that results tell whose code ran."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., list[Tensor]]:
        return lambda *args: [result + number for result in graph(*args)]

    return backend


FIRST, SECOND = dc.CompileConfig(backend=adding(100.0)), dc.CompileConfig(backend=adding(200.0))


@pytest.fixture(params=["caches of their own", "one cache"])
def engines(request) -> tuple[dc.DispatchCompileMode, dc.DispatchCompileMode]:
    """Modes whose code adds 100 and 200."""
    caches = [dc.NativeCache(), dc.NativeCache()]
    if request.param == "one cache":
        caches[1] = caches[0]
    first, second = (
        dc.DispatchCompileMode(config=config, cache=cache)
        for config, cache in zip((FIRST, SECOND), caches, strict=True)
    )
    return first, second


def stats_of(*modes: dc.DispatchCompileMode) -> list[dc.CacheStats]:
    """Of the modes' caches, each once."""
    return [cache.stats() for cache in dict.fromkeys(mode.cache for mode in modes)]


def together(*works: Callable[[], Any]) -> list[Any]:
    """Do each on a thread of its own, all at once."""
    start = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> Any:
        start.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(run, work) for work in works]]


def made_by(mode: dc.DispatchCompileMode, op: dc.IrOp) -> list[weakref.ref[Any]]:
    """The code in the mode's tables for the native implementation."""
    return [weakref.ref(one.code) for one in specializations(mode, op)]


# ---- Whose code runs


def test_taking_turns_on_one_thread(engines, counted):
    first, second = engines
    native = X * 2 + 1
    for _ in range(3):
        with first:
            assert_same(counted(X), native + 100)
        with second:
            assert_same(counted(X), native + 200)
        assert_same(counted(X), native)
    assert sum(stats.compiles for stats in stats_of(*engines)) == 2
    assert sum(stats.hits for stats in stats_of(*engines)) == 6


def test_nested(engines, counted):
    first, second = engines
    native = X * 2 + 1
    with first:
        assert_same(counted(X), native + 100)
        with second:
            assert_same(counted(X), native + 200)
            with first:
                assert_same(counted(X), native + 100)
            assert_same(counted(X), native + 200)
        assert_same(counted(X), native + 100)


def test_on_threads_at_the_same_time(engines, counted):
    """Also the first calls, which compile, and calls on a thread that is in no mode."""
    inputs = [torch.randn(tokens, width) for tokens in (1, 2, 5) for width in (3, 4)]

    def calls(mode: dc.DispatchCompileMode | None, added: float) -> Callable[[], None]:
        def work() -> None:
            for _ in range(20):
                with nullcontext() if mode is None else mode:
                    for x in inputs:
                        assert_same(counted(x), x * 2 + 1 + added if mode else x * 2 + 1)

        return work

    first, second = engines
    together(calls(first, 100), calls(second, 200), calls(first, 100), calls(second, 200), calls(None, 0))
    kinds = 4  # one token or more, of either width
    assert sum(stats.compiles for stats in stats_of(*engines)) == 2 * kinds
    assert sum(stats.hits for stats in stats_of(*engines)) == 4 * 20 * len(inputs)


def test_a_thread_in_one_engine_hands_work_to_one_in_another(engines, counted):
    first, second = engines
    native = X * 2 + 1

    def work(inherited: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with second:
            return [counted(X), inherited(X), counted(X)]

    with first:
        inherited = dc.inherit_modes(counted)
        [results] = together(lambda: work(inherited))
        assert_same(counted(X), native + 100)
    assert_same(results, [native + 200, native + 100, native + 200])


def test_an_engine_with_options_has_code_of_its_own(define_ir_op):
    """As generated: the assertions that one engine asks for are in its code and not in the other's."""

    def scaled(x: Tensor) -> Tensor:
        return x * 1.25

    op, cache = define_ir_op(scaled), dc.NativeCache()
    plain = dc.DispatchCompileMode(cache=cache)
    careful = dc.DispatchCompileMode(config=dc.CompileConfig(options={"size_asserts": True}), cache=cache)
    for _ in range(2):
        for mode in (plain, careful):
            assert_same(run_of(mode, op, X), X * 1.25)
    [of_plain], [of_careful] = (specializations(mode, op) for mode in (plain, careful))
    assert "assert_size_stride(arg" not in of_plain.code.source
    assert "assert_size_stride(arg" in of_careful.code.source
    assert cache.stats() == dc.CacheStats(compiles=2, hits=4, fallbacks=0, asides=0)


def run_of(mode: dc.DispatchCompileMode, op: Callable[..., Any], *args: Any) -> Any:
    with mode:
        return op(*args)


# ---- Providers and priorities


@pytest.fixture
def provided(define_ir_op) -> dc.IrOp:
    """``x + 1``, with a provider that gives ``x + 2`` so that results tell which one ran."""

    def plus(x: Tensor) -> Tensor:
        return x + 1

    op = define_ir_op(plus)

    @op.register_impl("vendor")
    def vendor(x: Tensor) -> Tensor:
        return x + 2

    return op


def test_providers(engines, provided):
    """What one engine compiles, the other passes; each of both implementations has code of its own."""
    native_only, _ = engines
    both = dc.DispatchCompileMode(
        config=dc.CompileConfig(backend=SECOND.backend, providers=("native", "vendor")), cache=native_only.cache
    )
    for _ in range(2):
        assert_same(run_of(native_only, provided, X), X + 1 + 100)
        assert_same(run_of(both, provided, X), X + 1 + 200)
        with provided.set_priority(["vendor"]):
            assert_same(run_of(native_only, provided, X), X + 2)
            assert_same(run_of(both, provided, X), X + 2 + 200)
    assert native_only.cache.stats() == dc.CacheStats(compiles=3, hits=6, fallbacks=0, asides=2)


def test_priority_changes_while_the_other_engine_runs(engines, provided):
    """A priority is for all threads: at any time a call is of the one implementation or the other, and the code that
    runs is of that implementation and of the engine."""
    modes = [
        dc.DispatchCompileMode(
            config=dc.CompileConfig(backend=mode.config.backend, providers=("native", "vendor")), cache=mode.cache
        )
        for mode in engines
    ]
    stop = threading.Event()

    def calls(mode: dc.DispatchCompileMode, added: float) -> Callable[[], set[float]]:
        def work() -> set[float]:
            with mode:
                return {float(provided(torch.zeros(2, 3)).unique() - added) for _ in range(300)}

        return work

    def changes() -> None:
        while not stop.is_set():
            with provided.set_priority(["vendor"]):
                provided(X)
            provided(X)

    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(changes)
        try:
            found = together(calls(modes[0], 100), calls(modes[1], 200))
        finally:
            stop.set()
        changing.result()
    assert all(values <= {1.0, 2.0} for values in found), found
    assert sum(stats.compiles for stats in stats_of(*modes)) <= 4


# ---- ops=


def test_each_catches_the_ops_that_it_selects(counted, provided):
    first = dc.DispatchCompileMode(ops=[counted.op], config=FIRST)
    second = dc.DispatchCompileMode(ops=[provided], config=SECOND)
    with first, second:
        assert_same(counted(X), X * 2 + 1 + 100)  # of the outer one: the inner one does not select it
        assert_same(provided(X), X + 1 + 200)
    with first:
        assert_same(provided(X), X + 1)
    with second:
        assert_same(counted(X), X * 2 + 1)
    assert [mode.cache.stats().hits for mode in (first, second)] == [1, 1]
    del first
    gc.collect()
    assert_same(run_of(second, provided, X), X + 1 + 200)


@pytest.fixture
def no_other_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that other tests left alive do not hear of new ops. To be asked for before the ops are made."""
    monkeypatch.setattr("dispatch_compile._mode._modes", weakref.WeakSet())


def test_hooks_stay_as_long_as_one_engine_needs_them(no_other_modes, counted, provided):
    first = dc.DispatchCompileMode(ops=[counted.op, provided], config=FIRST)
    second = dc.DispatchCompileMode(ops=[provided], config=SECOND)
    overloads = [counted.op.torch_op, provided.torch_op]

    def caught() -> list[bool]:
        gc.collect()
        return [has_kernel(overload, "BackendSelect") for overload in overloads]

    run_of(first, counted, X)
    assert caught() == [True, True]
    stop = threading.Event()

    def calls(mode: dc.DispatchCompileMode) -> int:
        count = 0
        with mode:
            while not stop.is_set():
                assert_same(provided(X), X + 1 + 200)
                count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(calls, second)
        del first
        try:
            assert caught() == [False, True]
        finally:
            stop.set()
        assert running.result() == second.cache.stats().hits
    del second
    assert caught() == [False, False]
    assert_same(counted(X), X * 2 + 1)


# ---- Caches


def test_clearing_one_cache_leaves_the_other_engine_its_code(counted):
    first, second = dc.DispatchCompileMode(config=FIRST), dc.DispatchCompileMode(config=SECOND)
    for mode in (first, second):
        run_of(mode, counted, X)
    [kept] = made_by(second, counted.op)
    [dropped] = made_by(first, counted.op)
    first.cache.clear()
    gc.collect()
    assert (dropped(), kept() is None) == (None, False)
    assert_same(run_of(second, counted, X), X * 2 + 1 + 200)
    assert_same(run_of(first, counted, X), X * 2 + 1 + 100)
    assert [mode.cache.stats().compiles for mode in (first, second)] == [2, 1]


def test_clearing_a_cache_while_engines_run(engines, counted):
    first, second = engines

    def calls(mode: dc.DispatchCompileMode, added: float) -> Callable[[], None]:
        def work() -> None:
            with mode:
                for i in range(60):
                    assert_same(counted(X), X * 2 + 1 + added)
                    if mode is first and i % 10 == 9:
                        first.cache.clear()

        return work

    together(calls(first, 100), calls(second, 200), calls(second, 200))
    stats = stats_of(*engines)
    assert sum(each.hits for each in stats) == 180
    if second.cache is not first.cache:
        assert (second.cache.stats().compiles, second.cache.stats().hits) == (1, 120)


def test_bounds_are_each_engines_own(counted):
    """In one cache, but under configurations that share no code."""
    cache = dc.NativeCache()
    bounded = dc.DispatchCompileMode(
        config=dc.CompileConfig(backend=FIRST.backend, max_specializations=1, eviction="lru"), cache=cache
    )
    free = dc.DispatchCompileMode(config=SECOND, cache=cache)
    for factor in (1.5, 2.5, 3.5):
        for mode, added in ((bounded, 100), (free, 200)):
            assert_same(run_of(mode, counted, X, factor), X * factor + 1 + added)
    assert len(specializations(free, counted.op)) == 3
    assert len(specializations(bounded, counted.op)) == 1
    assert cache.stats().compiles == 6


def test_warmup_is_for_one_engine(engines, counted):
    first, second = engines
    with second:  # to be in another engine's mode changes nothing about it
        first.warmup(counted.op, X, tokens=[1, 4])
    assert sum(stats.compiles for stats in stats_of(*engines)) == 2
    assert len(specializations(first, counted.op)) == 2
    assert specializations(second, counted.op) == []
    assert_same(run_of(second, counted, X), X * 2 + 1 + 200)
    assert_same(run_of(first, counted, X), X * 2 + 1 + 100)
    assert sum(stats.compiles for stats in stats_of(*engines)) == 3


def test_warmup_beside_an_engine_that_runs(engines, counted):
    first, second = engines

    def calls() -> None:
        with second:
            for _ in range(100):
                assert_same(counted(X), X * 2 + 1 + 200)

    def warms_up() -> list[str]:
        return [event.action for event in first.warmup(counted.op, X, tokens=[0, 1, 2])]

    _, actions = together(calls, warms_up)
    assert actions == ["compiled"] * 3
    assert len(specializations(first, counted.op)) == 3
    assert len(specializations(second, counted.op)) == 1


# ---- Failures, warnings, counts, traces


def failing(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    raise RuntimeError("no such luck")


def test_failures_are_one_engines_own(counted):
    """Of three engines that share a cache and a backend that fails, each does with it what it was told to do."""
    cache = dc.NativeCache()
    raising = dc.DispatchCompileMode(config=dc.CompileConfig(backend=failing, on_failure="raise"), cache=cache)
    lenient = dc.DispatchCompileMode(config=dc.CompileConfig(backend=failing, on_failure="native"), cache=cache)
    working = dc.DispatchCompileMode(config=FIRST, cache=cache)
    for first_time in (True, False):
        with pytest.raises(dc.CompileError, match="no such luck"), raising:
            counted(X)
        with pytest.warns(dc.DispatchCompileWarning, match="no such luck") if first_time else nullcontext():
            assert_same(run_of(lenient, counted, X), X * 2 + 1)
        assert_same(run_of(working, counted, X), X * 2 + 1 + 100)
    assert cache.stats() == dc.CacheStats(compiles=1, hits=2, fallbacks=4, asides=0)


@pytest.mark.parametrize("shared", [False, True])
def test_each_engine_warns_once(shared, counted):
    """Engines of one configuration that share a cache are one engine in this."""
    config = dc.CompileConfig(backend=failing, on_failure="native")
    caches = [dc.NativeCache()] * 2 if shared else [dc.NativeCache(), dc.NativeCache()]
    modes = [dc.DispatchCompileMode(config=config, cache=cache) for cache in caches]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for mode in modes:
                run_of(mode, counted, X)
    assert len([one for one in caught if one.category is dc.DispatchCompileWarning]) == (1 if shared else 2)


@pytest.fixture
def counts_of(counted) -> Callable[[], dict[str, int]]:
    """``counts_of()``: the process's counts of the op since the test began."""
    name = f"{counted.op.torch_op._schema.name}.default"

    def now() -> dict[str, int]:
        totals = dc.counters()
        return {kind: totals[kind][name] for kind in ("compiles", "hits", "fallbacks", "asides")}

    before = now()
    return lambda: {kind: count - before[kind] for kind, count in now().items()}


def test_counts_are_each_caches_own_and_the_process_has_their_sum(counted, counts_of):
    first, second = dc.DispatchCompileMode(config=FIRST), dc.DispatchCompileMode(config=SECOND)
    with first:
        counted(X)
        counted(X)
        with second:
            counted(X)
            counted(X.clone().requires_grad_())  # steps aside
    assert first.cache.stats() == dc.CacheStats(compiles=1, hits=2, fallbacks=0, asides=0)
    assert second.cache.stats() == dc.CacheStats(compiles=1, hits=1, fallbacks=0, asides=1)
    assert counts_of() == {"compiles": 2, "hits": 3, "fallbacks": 0, "asides": 1}
    first.cache.clear()
    del first
    gc.collect()
    run_of(second, counted, X)
    assert counts_of() == {"compiles": 2, "hits": 4, "fallbacks": 0, "asides": 1}


def test_counts_of_many_threads_add_up(engines, counted, counts_of):
    def calls(mode: dc.DispatchCompileMode) -> Callable[[], None]:
        def work() -> None:
            for _ in range(200):
                run_of(mode, counted, X)

        return work

    together(*(calls(mode) for mode in engines * 2))
    assert counts_of() == {"compiles": 2, "hits": 800, "fallbacks": 0, "asides": 0}
    assert sum(stats.hits for stats in stats_of(*engines)) == 800


def test_traces(counted):
    """A trace has the calls in its mode's block, and a mode inside it decides; of a mode beside it, it has nothing."""
    outer = dc.DispatchCompileMode(config=FIRST, trace=True)
    inner, beside = dc.DispatchCompileMode(config=SECOND), dc.DispatchCompileMode(config=SECOND, trace=True)
    with outer:
        counted(X)
        run_of(inner, counted, X)
        together(lambda: run_of(beside, counted, X))
    run_of(inner, counted, X)
    assert [(event.action, event.new) for event in outer.trace.events] == [("compiled", True)] * 2
    assert [(event.action, event.new) for event in beside.trace.events] == [("compiled", True)]
    assert inner.cache.stats().hits == 2


# ---- Ops that come and go


def test_an_op_of_one_engine_comes_and_goes_beside_the_other(engines, counted):
    first, second = engines

    def calls() -> None:
        with second:
            for _ in range(300):
                assert_same(counted(X), X * 2 + 1 + 200)

    def registers() -> None:
        for number in range(10):

            def passing(x: Tensor, number: int = number) -> Tensor:
                return x + number

            op = dc.register_op(passing, name=f"isolated_{number % 2}")
            try:
                assert_same(run_of(first, op, X), X + number + 100)
            finally:
                op.unregister()

    together(calls, registers)
    of_second = [stats.hits for stats in stats_of(second)]
    assert of_second == [300 if first.cache is not second.cache else 310]


def test_a_removed_reference_implementation_goes_for_both(engines, define_opaque):
    def twice(x: Tensor) -> Tensor:
        return x * 2

    op = define_opaque(twice)
    handle = dc.register_native(op, twice)
    with engines[0]:
        assert_same(op(X), X * 2 + 100)
        with engines[1]:
            assert_same(op(X), X * 2 + 200)
            handle.remove()
            assert_same(op(X), X * 2)
        assert_same(op(X), X * 2)
    gc.collect()
    assert [len(mode.cache) for mode in engines] == [0, 0]


def test_an_engine_that_goes_takes_nothing_from_the_other(counted):
    cache = dc.NativeCache()
    first, second = (dc.DispatchCompileMode(config=config, cache=cache) for config in (FIRST, SECOND))
    for mode in (first, second):
        run_of(mode, counted, X)
    del mode, first
    gc.collect()
    assert_same(run_of(second, counted, X), X * 2 + 1 + 200)
    assert cache.stats().compiles == 2
    again = dc.DispatchCompileMode(config=FIRST, cache=cache)
    assert_same(run_of(again, counted, X), X * 2 + 1 + 100)
    assert cache.stats().compiles == 2, "code stays in the cache"


def test_in_the_background_for_one_engine_only(counted):
    """The other compiles at once, of the same cache, under a configuration of its own."""
    cache = dc.NativeCache()
    background = dc.DispatchCompileMode(
        config=dc.CompileConfig(backend=FIRST.backend, on_new="background"), cache=cache, trace=True
    )
    second = dc.DispatchCompileMode(config=SECOND, cache=cache)
    assert_same(run_of(background, counted, X), X * 2 + 1)
    assert_same(run_of(second, counted, X), X * 2 + 1 + 200)
    assert cache.wait(60)
    assert_same(run_of(background, counted, X), X * 2 + 1 + 100)
    assert_same(run_of(second, counted, X), X * 2 + 1 + 200)
    assert cache.stats() == dc.CacheStats(compiles=2, hits=3, fallbacks=1, asides=0)


def test_a_backend_as_a_callable_is_told_from_another_of_its_kind(counted):
    """Engines with equal backends share code; with others they do not, however alike these are."""
    cache, same = dc.NativeCache(), dc.CompileConfig(backend=FIRST.backend)
    for config, compiles in ((FIRST, 1), (same, 1), (dc.CompileConfig(backend=adding(100.0)), 2), (EAGER, 3)):
        run_of(dc.DispatchCompileMode(config=config, cache=cache), counted, X)
        assert cache.stats().compiles == compiles
