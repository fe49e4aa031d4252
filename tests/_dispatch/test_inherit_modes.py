"""Work that is handed to another thread, taken along with the caller's modes or not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import EAGER

import dispatch_compile as dc


@pytest.fixture
def pool():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_worker_runs_inside_the_callers_mode(pool, counted):
    mode = dc.DispatchCompileMode(config=EAGER)
    with mode:
        work = dc.inherit_modes(counted)
        pool.submit(counted, torch.ones(4, 3)).result()
        assert mode.cache.stats().hits == 0, "a thread starts without any mode"
        pool.submit(work, torch.ones(4, 3)).result()
    assert mode.cache.stats().hits == 1


def test_modes_are_those_of_when_it_was_wrapped(pool, counted):
    mode = dc.DispatchCompileMode(config=EAGER)
    before = dc.inherit_modes(counted)
    with mode:
        inside = dc.inherit_modes(counted)
    pool.submit(before, torch.ones(4, 3)).result()
    assert mode.cache.stats().hits == 0
    pool.submit(inside, torch.ones(4, 3)).result()
    assert mode.cache.stats().hits == 1


def test_nested_modes_keep_their_order(pool, counted):
    outer, inner = dc.DispatchCompileMode(config=EAGER, trace=True), dc.DispatchCompileMode(config=EAGER)
    with outer, inner:
        work = dc.inherit_modes(counted)
    pool.submit(work, torch.ones(4, 3)).result()
    assert (outer.cache.stats().hits, inner.cache.stats().hits) == (0, 1)
    assert len(outer.trace.events) == 1


def test_worker_is_left_as_it_was(pool, counted):
    mode = dc.DispatchCompileMode(config=EAGER)

    def fail() -> None:
        raise KeyError("no")

    with mode:
        work = dc.inherit_modes(fail)
    with pytest.raises(KeyError):
        pool.submit(work).result()
    pool.submit(counted, torch.ones(4, 3)).result()
    assert mode.cache.stats().hits == 0


def test_keeps_name_and_arguments():
    def decode(batch: int, *, greedy: bool) -> tuple[int, bool]:
        """Decode."""
        return batch, greedy

    work = dc.inherit_modes(decode)
    assert (work.__name__, work.__doc__) == ("decode", "Decode.")
    assert work(3, greedy=True) == (3, True)


def test_on_an_autograd_thread(counted):
    """Backward functions run wherever autograd likes; what they call can take the modes along."""
    mode = dc.DispatchCompileMode(config=EAGER)

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.work = dc.inherit_modes(counted)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return ctx.work(grad)

    with mode:
        y = Doubled.apply(torch.ones(3, 3, requires_grad=True)).sum()
    with ThreadPoolExecutor(1) as other:
        other.submit(y.backward).result()
    assert mode.cache.stats().hits == 1
