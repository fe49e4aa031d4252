"""Modes among the tasks of an event loop, and left in any order: no call is ever caught by another's mode."""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, suppress

import pytest
import torch
from support import EAGER

import dispatch_compile as dc

X = torch.ones(4, 3)


@pytest.fixture
def make_mode():
    cache = dc.NativeCache()
    return lambda trace=True: dc.DispatchCompileMode(config=EAGER, cache=cache, trace=trace)


def assert_no_mode_is_active(counted) -> None:
    before = counted.python_runs
    counted(X)
    assert counted.python_runs == before + 1, "a call was caught outside of every `with`"
    assert dc._mode.current_mode() is None


@pytest.mark.parametrize("trace", [True, False])
def test_a_hundred_tasks_that_interleave_fail_and_are_cancelled(counted, make_mode, trace):
    """Each counts its own calls, made inside of its modes, between waits of random lengths."""
    rng, shared = random.Random(0), make_mode()
    caches = [dc.NativeCache() for _ in range(100)]
    modes = [dc.DispatchCompileMode(config=EAGER, cache=cache, trace=trace) for cache in caches]
    made, made_in_shared = [0] * 100, [0] * 100

    async def wait() -> None:
        await asyncio.sleep(rng.random() / 100)

    async def call(number: int) -> None:
        counted(torch.ones(rng.randint(2, 9), 3))
        made[number] += 1
        await wait()

    async def task(number: int) -> None:
        for _ in range(3):
            before = made[number], caches[number].stats().hits
            await wait()
            with modes[number]:
                await call(number)
                with modes[number]:
                    await call(number)
                if number % 3 == 0:
                    raise KeyError(number)
                with shared:
                    counted(X)
                    made_in_shared[number] += 1
                    await wait()
                await call(number)
            assert (made[number] - before[0], caches[number].stats().hits - before[1]) == (3, 3)
            assert dc._mode.current_mode() is None

    async def main() -> list[BaseException | None]:
        tasks = [asyncio.create_task(task(number)) for number in range(100)]
        await wait()
        for number in range(1, 100, 5):
            tasks[number].cancel()
            await wait()
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = asyncio.run(main())
    kinds = {type(outcome) for outcome in outcomes}
    assert kinds == {type(None), KeyError, asyncio.CancelledError}
    assert [cache.stats().hits for cache in caches] == made
    if trace:
        assert [len(mode.trace) for mode in modes] == [sum(both) for both in zip(made, made_in_shared, strict=True)]
    assert_no_mode_is_active(counted)


def test_two_tasks_that_leave_in_the_order_of_entering(counted, make_mode):
    first, second = make_mode(), make_mode()

    async def task(mode: dc.DispatchCompileMode, seconds: float) -> None:
        with mode:
            await asyncio.sleep(seconds)
            counted(X)

    async def main() -> None:
        await asyncio.gather(task(first, 0.01), task(second, 0.03))

    asyncio.run(main())
    assert (len(first.trace), len(second.trace)) == (1, 1)
    assert_no_mode_is_active(counted)


def test_a_task_that_is_started_inside_is_in_the_mode_as_long_as_that_is_entered(counted, make_mode):
    """Its context is a copy of its parent's. What outlives the `with` block is out of the mode when that ends."""
    outer, inner, own = make_mode(), make_mode(False), make_mode()

    async def child(gate: asyncio.Event) -> None:
        counted(X)
        with own:
            await gate.wait()
            counted(X)  # the mode around is gone
        counted(X)
        with own:
            counted(X)

    async def main() -> None:
        gate = asyncio.Event()
        with outer, inner:
            task = asyncio.create_task(child(gate))
            await asyncio.sleep(0)
            counted(X)
        gate.set()
        await task

    asyncio.run(main())
    assert (len(outer.trace), len(own.trace)) == (2, 2)
    assert_no_mode_is_active(counted)


def test_around_the_whole_loop(counted, make_mode):
    mode = make_mode()

    async def main() -> None:
        await asyncio.gather(*(asyncio.to_thread(counted, X) for _ in range(3)))
        counted(X)

    with mode:
        asyncio.run(main())
    assert len(mode.trace) == 4
    assert_no_mode_is_active(counted)


def test_work_on_a_thread_of_the_loop_is_in_the_mode(counted, make_mode):
    mode = make_mode()

    async def main() -> None:
        with mode:
            await asyncio.to_thread(counted, X)
        await asyncio.to_thread(counted, X)

    asyncio.run(main())
    assert len(mode.trace) == 1


def test_an_async_generator_that_is_abandoned(counted, make_mode):
    """The loop closes it in a task of its own."""
    mode = make_mode()

    async def outputs() -> AsyncIterator[torch.Tensor]:
        with mode:
            while True:
                yield counted(X)

    async def main() -> None:
        async for _ in outputs():
            break
        await asyncio.sleep(0.01)
        assert_no_mode_is_active(counted)

    asyncio.run(main())
    assert len(mode.trace) == 1


def test_generators_that_end_in_any_order(counted, make_mode):
    modes = [make_mode() for _ in range(3)]

    def steps(mode: dc.DispatchCompileMode) -> Iterator[None]:
        with mode:
            yield

    for order in ([0, 1, 2], [2, 0, 1], [1, 0, 2]):
        generators = [steps(mode) for mode in modes]
        for generator in generators:
            next(generator)
        for number in order:
            generators[number].close()
        assert_no_mode_is_active(counted)


def test_an_exit_stack_that_is_handed_on(counted, make_mode):
    outer, inner = make_mode(), make_mode()
    stack = ExitStack()
    stack.enter_context(outer)
    with inner:
        rest = stack.pop_all()
        rest.close()
        counted(X)
    assert (len(outer.trace), len(inner.trace)) == (0, 1)
    assert_no_mode_is_active(counted)


def test_left_in_another_context(counted, make_mode):
    mode, others = make_mode(), contextvars.Context()
    with mode:
        with pytest.raises(RuntimeError, match="left where it was not entered"):
            others.run(mode.__exit__, None, None, None)
        others.run(counted, X)
        counted(X)
    assert len(mode.trace) == 1
    assert_no_mode_is_active(counted)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_compile_natives_as_a_block_in_tasks(counted, make_mode, order):
    """Bare blocks share one object: one of them is in its caller's mode, the other in the default mode."""
    mode, default = make_mode(), dc.compile_natives
    gates: list[asyncio.Event] = []

    async def task(number: int) -> None:
        with ExitStack() as entered:
            if number == 0:
                entered.enter_context(mode)
            with default as current:
                assert (current is mode) == (number == 0)
                await gates[number].wait()
                assert dc._mode.current_mode() is current
            assert dc._mode.current_mode() is (mode if number == 0 else None)

    async def main() -> None:
        gates.extend(asyncio.Event() for _ in range(2))
        tasks = [asyncio.create_task(task(number)) for number in range(2)]
        await asyncio.sleep(0)
        for number in order:
            gates[number].set()
            await tasks[number]

    asyncio.run(main())
    assert_no_mode_is_active(counted)


def test_a_mode_that_sees_every_op_sees_those_of_its_own_task(counted):
    """Such a mode is on the thread's stack of modes."""
    modes = [dc.DispatchCompileMode(config=EAGER, trace=dc.Trace(all_ops=True)) for _ in range(2)]
    selective = dc.DispatchCompileMode(config=EAGER, trace=True)

    async def task(mode: dc.DispatchCompileMode, seconds: float) -> None:
        with mode:
            for _ in range(3):
                await asyncio.sleep(seconds)
                counted(X)
                X.sin()

    async def main() -> None:
        await asyncio.gather(task(modes[0], 0.001), task(modes[1], 0.003), task(selective, 0.002))

    asyncio.run(main())
    for mode in modes:
        assert [call.op for call in mode.trace.calls] == [
            f"{counted.op.torch_op._schema.name}.default",
            "aten::sin.default",
        ] * 3
        assert {event.action for event in mode.trace.events} == {"compiled"}
    assert len(selective.trace) == 3
    assert torch._C._len_torch_dispatch_stack() == 0
    assert_no_mode_is_active(counted)


def test_modes_that_see_every_op_left_in_another_order(counted):
    """torch itself takes off its stack what is on top."""
    modes = [dc.DispatchCompileMode(config=EAGER, trace=dc.Trace(all_ops=True)) for _ in range(3)]
    flag = torch.utils._python_dispatch.is_in_torch_dispatch_mode()  # threads of other modes may have left it on
    for mode in modes:
        mode.__enter__()
    seen = []
    for mode in (modes[1], modes[0], modes[2]):
        X.sin()
        mode.__exit__(None, None, None)
        seen.append([len(each.trace.calls) for each in modes])
    assert seen == [[1, 1, 1], [2, 1, 2], [2, 1, 3]]
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch.utils._python_dispatch.is_in_torch_dispatch_mode() == flag
    X.sin()
    assert [len(each.trace.calls) for each in modes] == [2, 1, 3]
    with suppress(RuntimeError):
        modes[0].__exit__(None, None, None)
    assert_no_mode_is_active(counted)
