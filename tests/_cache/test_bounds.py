"""How many specializations there may be of an implementation, and what happens to calls that would need one more."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextvars import copy_context

import pytest
import torch
from support import EAGER, assert_same, specializations
from torch import Tensor

import dispatch_compile as dc


def bounded(**options) -> dc.DispatchCompileMode:
    return dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", **options), trace=True)


def test_beyond_the_limit_calls_run_eagerly_with_one_warning_that_names_what_changes(counted):
    mode, x = bounded(max_specializations=2), torch.randn(4, 3)
    with mode:
        counted(x, 1.0)
        counted(x, 2.5)
        with pytest.warns(dc.DispatchCompileWarning, match=r"2 specializations.*factor is any float, was 2\.5"):
            assert_same(counted(x, 3.0), x * 3.0 + 1)
        assert_same(counted(x, 4.0), x * 4.0 + 1)  # a second warning would be an error
        counted(x, 1.0)
    assert [event.action for event in mode.trace.events] == ["compiled", "compiled", "eager", "eager", "compiled"]
    assert "max_specializations" in mode.trace.events[2].reason
    assert mode.cache.stats() == dc.CacheStats(compiles=2, hits=3, fallbacks=2, asides=0)


def test_the_limit_is_for_each_implementation(counted, define_ir_op):
    def other(x: Tensor) -> Tensor:
        return x + 3

    op, mode, x = define_ir_op(other), bounded(max_specializations=1), torch.randn(4, 3)
    with mode:
        counted(x)
        op(x)
    assert mode.cache.stats().compiles == 2


def test_the_least_recently_used_goes(counted):
    mode, x = bounded(max_specializations=2, eviction="lru"), torch.randn(4, 3)
    with mode:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert_same(counted(x.to(dtype), 2.5), x.to(dtype) * 2.5 + 1)
        compiles = mode.cache.stats().compiles
        counted(x.half(), 2.5)
        assert mode.cache.stats().compiles == compiles, "the latest is there still"
        counted(x.double(), 2.5)
        assert mode.cache.stats().compiles == compiles + 1
    assert {event.action for event in mode.trace.events} == {"compiled"}


def test_what_is_dropped_is_freed(counted):
    mode, x = bounded(max_specializations=1, eviction="lru"), torch.randn(4, 3)
    with mode:
        counted(x, 1.0)
        [first] = specializations(mode, counted.op)
        code = weakref.ref(first.code)
        del first
        counted(x, 2.5)
    gc.collect()
    assert code() is None


class Counts:
    """How much there is of what must not pile up, by type, and of anything."""

    PILING_UP = frozenset(
        "Code FakeTensor FakeTensorMode Graph Guarded IrOp IrOpImpl Library NoCode Parameters Route ShapeEnv "
        "Specialization SymNode Table Tensor".split()
    )

    def __init__(self) -> None:
        gc.collect()
        names = [type(thing).__name__ for thing in gc.get_objects()]
        self.anything = len(names)
        self.by_type = Counter(name for name in names if name in self.PILING_UP)


def come_and_go(mode: dc.DispatchCompileMode, native: Callable[..., Tensor], names: Iterable[str]) -> None:
    """Register an op for each name, call it in the mode, and drop it."""
    for name in names:
        op = dc.register_op(native, name=name)
        with mode:
            op(torch.ones(2, 3))
        op.unregister()


def negative(x: Tensor) -> Tensor:
    return -x


def test_a_thousand_ops_that_come_and_go_leave_their_names():
    """What is left of one are the kernels and the entries that torch keeps by name: some 50 small objects."""
    mode = dc.DispatchCompileMode(config=EAGER)
    come_and_go(mode, negative, [f"passing_{number}" for number in range(200)])
    before = Counts()
    come_and_go(mode, negative, [f"passing_{number}" for number in range(200, 1000)])
    after = Counts()
    assert mode.cache.stats().compiles == 1000
    assert len(mode.cache) == 0
    assert sum((after.by_type - before.by_type).values()) <= 5, after.by_type - before.by_type
    assert (after.anything - before.anything) / 800 < 120  # modes that other tests left alive count ops, too


def test_inductors_modules_go_with_the_ops_that_they_were_made_for():
    from torch._inductor.codecache import PyCodeCache

    def counts() -> tuple[int, ...]:
        gc.collect()
        modules = sum(name.startswith("torch._inductor.runtime.compile_tasks.") for name in sys.modules)
        return modules, len(PyCodeCache.modules), len(PyCodeCache.linemaps), len(copy_context())

    mode = dc.DispatchCompileMode()
    come_and_go(mode, negative, ["first"])
    before, objects_before = counts(), Counts()
    come_and_go(mode, negative, [f"equal_{number}" for number in range(20)])
    after, objects_after = counts(), Counts()
    assert mode.cache.stats().hits == 21
    assert after == before
    assert sum((objects_after.by_type - objects_before.by_type).values()) <= 5


def test_code_goes_on_when_equal_code_is_dropped(define_ir_op):
    stays, mode = define_ir_op(negative), dc.DispatchCompileMode()
    with mode:
        stays(torch.ones(2, 3))
        for name in ("before", "after"):
            come_and_go(mode, negative, [name])
            gc.collect()
            assert_same(stays(torch.ones(5, 3)), -torch.ones(5, 3))
    assert mode.cache.stats() == dc.CacheStats(compiles=3, hits=5, fallbacks=0, asides=0)
    assert len(mode.cache) == 1


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_specializations": 0}, ValueError, "max_specializations must be 1 or more, not 0"),
        ({"max_specializations": True}, TypeError, "max_specializations must be a number, not True"),
        ({"eviction": "fifo"}, ValueError, "eviction must be one of"),
        ({"on_new": "later"}, ValueError, "on_new must be one of .*'background'.*, not 'later'"),
    ],
)
def test_options_that_make_no_sense(options, error, text):
    with pytest.raises(error, match=text):
        dc.CompileConfig(**options)


def test_options_that_change_no_code_share_it(counted):
    cache, x = dc.NativeCache(), torch.randn(4, 3)
    for options in ({}, {"max_specializations": 7}, {"eviction": "lru"}, {"on_new": "background"}):
        with dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", **options), cache=cache):
            counted(x)
    assert cache.stats().compiles == 1
    assert cache.stats().hits == 4
