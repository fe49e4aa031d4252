"""How many specializations there may be of an implementation, and what happens to calls that would need one more."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support import EAGER, assert_same, specializations
from torch import Tensor

import dispatch_compile as dc


def bounded(**options) -> dc.DispatchCompileMode:
    return dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", **options), trace=True)


def test_beyond_the_limit_calls_run_natively_with_one_warning_that_names_what_changes(counted):
    mode, x = bounded(max_specializations=2), torch.randn(4, 3)
    with mode:
        counted(x, 1.0)
        counted(x, 2.5)
        with pytest.warns(dc.DispatchCompileWarning, match=r"2 specializations.*factor is 3\.0, was 2\.5"):
            assert_same(counted(x, 3.0), x * 3.0 + 1)
        assert_same(counted(x, 4.0), x * 4.0 + 1)  # a second warning would be an error
        counted(x, 1.0)
    assert [event.action for event in mode.trace.events] == ["compiled", "compiled", "native", "native", "compiled"]
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
        for factor in (1.0, 2.5, 3.0, 4.0):
            assert_same(counted(x, factor), x * factor + 1)
        compiles = mode.cache.stats().compiles
        counted(x, 4.0)
        assert mode.cache.stats().compiles == compiles, "the latest is there still"
        counted(x, 1.0)
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


def test_ops_that_come_and_go_leave_nothing():
    def passing(x: Tensor) -> Tensor:
        return x * 2 + 1

    mode = dc.DispatchCompileMode(config=EAGER)
    counts = []
    for batch in range(2):
        for number in range(200 if batch else 20):
            op = dc.register_op(passing, name=f"passing_{number}")
            with mode:
                op(torch.ones(2, 3))
            op.unregister()
        del op
        gc.collect()
        kinds = ("Specialization", "Code", "Table", "Route", "IrOp", "Guarded")
        counts.append(sum(type(thing).__name__ in kinds for thing in gc.get_objects()))
    assert counts[1] <= counts[0] + 5
    assert len(mode.cache) == 0


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_specializations": 0}, ValueError, "max_specializations must be 1 or more, not 0"),
        ({"max_specializations": True}, TypeError, "max_specializations must be a number, not True"),
        ({"eviction": "fifo"}, ValueError, "eviction must be one of"),
        ({"background": 1}, TypeError, "background must be True or False, not 1"),
    ],
)
def test_options_that_make_no_sense(options, error, text):
    with pytest.raises(error, match=text):
        dc.CompileConfig(**options)


def test_options_that_change_no_code_share_it(counted):
    cache, x = dc.NativeCache(), torch.randn(4, 3)
    for options in ({}, {"max_specializations": 7}, {"eviction": "lru"}, {"background": True}):
        with dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", **options), cache=cache):
            counted(x)
    assert cache.stats().compiles == 1
    assert cache.stats().hits == 4
