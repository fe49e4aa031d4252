"""Counts without tracing: per cache, and over the whole process."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
from support import EAGER, EAGER_OR_NATIVE
from torch import Tensor

import dispatch_compile as dc


def counts_of(op: dc.IrOp) -> dict[str, int]:
    name = f"{op.torch_op._schema.name}.default"
    return {kind: counts[name] for kind, counts in dc.counters().items() if kind != "reasons"}


def test_what_became_of_calls(counted):
    mode = dc.DispatchCompileMode(config=EAGER)
    with mode:
        counted(torch.ones(4, 3))
        counted(torch.ones(5, 3))
        counted(torch.ones(4, 3, requires_grad=True))
    assert counts_of(counted.op) == {"compiles": 1, "hits": 2, "fallbacks": 0, "asides": 1, "loads": 0}


def test_calls_that_pass_for_their_provider(counted):
    """Also by the short cut, which is taken where there is no trace and the mode knows the calls."""
    reason, before = "provider 'native' is not in providers ('vendor',)", dc.counters()["reasons"]
    for trace in (False, True):
        with dc.DispatchCompileMode(config=dc.CompileConfig(providers=["vendor"]), trace=trace) as mode:
            for _ in range(3):
                counted(torch.ones(4, 3))
        assert mode.cache.stats() == dc.CacheStats(compiles=0, hits=0, fallbacks=0, asides=3)
    assert dc.counters()["reasons"] - before == {reason: 6}


@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_reasons(define_ir_op):
    def rolled(x: Tensor) -> Tensor:
        return x.roll(int(x.sum()))

    op, before = define_ir_op(rolled), dc.counters()["reasons"]
    with dc.DispatchCompileMode(config=EAGER_OR_NATIVE):
        for _ in range(3):
            op(torch.ones(4))
        op(torch.ones(4, requires_grad=True))
    [(native, times), (passed, once)] = (dc.counters()["reasons"] - before).most_common()
    assert "cannot be captured" in native
    assert (times, passed, once) == (3, "x requires grad and grad mode is on", 1)
    assert counts_of(op)["fallbacks"] == 3


def test_caches_are_added_up_also_after_they_are_gone(counted):
    for expected in (1, 2, 3):
        with dc.DispatchCompileMode(config=EAGER):
            counted(torch.ones(4, 3))
        gc.collect()
        assert counts_of(counted.op)["compiles"] == expected


def test_a_cache_counts_over_its_ops_and_modes(counted, define_ir_op):
    def other(x: Tensor) -> Tensor:
        return x + 3

    op, cache = define_ir_op(other), dc.NativeCache()
    for _ in range(2):
        with dc.DispatchCompileMode(config=EAGER, cache=cache):
            counted(torch.ones(4, 3))
            op(torch.ones(4, 3))
    assert cache.stats() == dc.CacheStats(compiles=2, hits=4, fallbacks=0, asides=0)


def test_is_a_snapshot(counted):
    before = dc.counters()
    with dc.DispatchCompileMode(config=EAGER):
        counted(torch.ones(4, 3))
    name = f"{counted.op.torch_op._schema.name}.default"
    assert name not in before["hits"]
    before["hits"][name] = 100
    assert dc.counters()["hits"][name] == 1
    assert all(type(counts) is Counter for counts in before.values())
