"""``compile_natives``: around the body of a custom op, below and above ``custom_op``, and around anything else.

This module's annotations are text, which ``torch.library`` must still be able to read through the decorator.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
import torch
from support import EAGER, assert_same
from torch import Tensor

import dispatch_compile as dc

ROUNDS = 2


def hits(mode: dc.DispatchCompileMode) -> int:
    return mode.cache.stats().hits


@pytest.fixture
def mode():
    return dc.DispatchCompileMode(config=EAGER)


@pytest.fixture
def custom_op():
    """``torch.library.custom_op`` under names that are not used twice."""
    made = []

    def decorate(fn):
        op = torch.library.custom_op(f"dispatch_compile_test::body_{id(fn)}_{len(made)}", fn, mutates_args=())
        made.append(op)
        return op

    return decorate


@pytest.fixture
def body(counted):
    def body(x: Tensor, factor: float = 2.0) -> Tensor:
        return counted(x, factor).cos()

    return body


def test_below_custom_op(mode, body, custom_op):
    op = custom_op(dc.compile_natives(mode=mode)(body))
    x = torch.randn(4, 3)
    expected = body(x)
    for _ in range(ROUNDS):
        assert_same(op(x), expected)
    assert hits(mode) == ROUNDS
    assert "(Tensor x, float factor=2." in str(op._opoverload._schema)


def test_above_custom_op(mode, body, custom_op):
    plain = custom_op(body)
    op = dc.compile_natives(mode=mode)(plain)
    assert op is plain
    x = torch.randn(4, 3)
    expected = body(x)
    for _ in range(ROUNDS):
        assert_same(op(x), expected)
    assert hits(mode) == ROUNDS


def test_as_decorators_one_above_the_other(counted):
    mode = dc.DispatchCompileMode(config=EAGER)

    @dc.compile_natives(mode=mode)
    @torch.library.custom_op("dispatch_compile_test::decorated_above", mutates_args=())
    def above(x: Tensor) -> Tensor:
        return counted(x) * 2

    @torch.library.custom_op("dispatch_compile_test::decorated_below", mutates_args=())
    @dc.compile_natives(mode=mode)
    def below(x: Tensor) -> Tensor:
        return counted(x) * 2

    x = torch.randn(4, 3)
    assert_same(above(x), below(x))
    assert hits(mode) == 2


def test_above_custom_op_keeps_kernels_of_devices_apart(mode, counted, custom_op):
    def generic(x: Tensor) -> Tensor:
        return counted(x) * 0

    op = custom_op(generic)

    @op.register_kernel("cpu")
    def cpu(x: Tensor) -> Tensor:
        return counted(x) * 2

    x = torch.randn(4, 3)
    expected = op(x)
    dc.compile_natives(mode=mode)(op)
    assert_same(op(x), expected)
    assert hits(mode) == 1


def test_under_outer_compile(mode, body, custom_op):
    op = custom_op(dc.compile_natives(mode=mode)(body))
    op.register_fake(lambda x, factor=2.0: torch.empty_like(x))
    x = torch.randn(4, 3)
    compiled = torch.compile(lambda x: op(x.sin()), backend="eager", fullgraph=True)
    assert_same(compiled(x), body(x.sin()))
    assert hits(mode) == 1


def test_plain_function(mode, body):
    decorated = dc.compile_natives(mode=mode)(body)
    x = torch.randn(4, 3)
    assert_same(decorated(x, factor=3.0), body(x, 3.0))
    assert hits(mode) == 1
    assert (decorated.__name__, decorated.__wrapped__) == ("body", body)
    assert list(inspect.signature(decorated).parameters) == ["x", "factor"]
    assert inspect.signature(decorated).parameters["x"].annotation is Tensor


def test_method(mode, counted):
    class Layer(torch.nn.Module):
        @dc.compile_natives(mode=mode)
        def forward(self, x: Tensor) -> Tensor:
            return counted(x)

    Layer()(torch.randn(4, 3))
    assert hits(mode) == 1


def test_annotation_that_cannot_be_read(mode, counted):
    @dc.compile_natives(mode=mode)
    def strange(x: NoSuchType) -> Tensor:  # noqa: F821
        return counted(x)

    strange(torch.randn(4, 3))
    assert hits(mode) == 1


def test_errors_of_the_body_come_out(mode):
    @dc.compile_natives(mode=mode)
    def fail(x: Tensor) -> Tensor:
        raise KeyError("body")

    with pytest.raises(KeyError, match="body"):
        fail(torch.ones(1))
    with mode:
        pass  # the mode was left


# ---- Which mode


def test_config_makes_a_mode_of_its_own(body, counted):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    decorated = dc.compile_natives(config=dc.CompileConfig(backend=backend))(body)
    x = torch.randn(4, 3)
    for _ in range(ROUNDS):
        decorated(x)
    assert len(graphs) == 1


def test_bare_uses_the_mode_around_the_call(mode, body):
    decorated = dc.compile_natives(body)
    with mode:
        decorated(torch.randn(4, 3))
    assert hits(mode) == 1


def test_bare_without_a_mode_has_a_default_one(counted):
    def body(x: Tensor) -> Tensor:
        return counted(x)

    one, other = dc.compile_natives(body), dc.compile_natives(body)
    x = torch.randn(4, 3)
    expected = one(x)
    runs = counted.python_runs
    assert_same(other(x), expected)
    assert_same(one(x), expected)
    assert counted.python_runs == runs, "all bare bodies share compiled code"
    counted(x)
    assert counted.python_runs == runs + 1, "the default mode ends with the body"


def test_given_mode_wins_over_the_one_around(mode, body):
    around = dc.DispatchCompileMode(config=EAGER)
    decorated = dc.compile_natives(mode=mode)(body)
    with around:
        decorated(torch.randn(4, 3))
    assert (hits(mode), hits(around)) == (1, 0)


def test_bare_call_with_no_arguments(mode, body):
    decorated = dc.compile_natives()(body)
    with mode:
        decorated(torch.randn(4, 3))
    assert hits(mode) == 1


def test_function_and_mode_at_once(mode, body):
    dc.compile_natives(body, mode=mode)(torch.randn(4, 3))
    assert hits(mode) == 1


# ---- As a with block


def test_with_a_mode(mode, counted):
    with dc.compile_natives(mode=mode) as entered:
        counted(torch.randn(4, 3))
    assert entered is mode
    assert hits(mode) == 1
    counted(torch.randn(4, 3))
    assert hits(mode) == 1


@pytest.mark.parametrize("written", ["bare", "called"])
def test_with_nothing_given(written, counted):
    x = torch.randn(4, 3)
    with dc.compile_natives if written == "bare" else dc.compile_natives() as entered:
        counted(x)
        runs = counted.python_runs
        counted(x)
    assert isinstance(entered, dc.DispatchCompileMode)
    assert counted.python_runs == runs
    counted(x)
    assert counted.python_runs == runs + 1


def test_with_nothing_given_inside_a_mode(mode, counted):
    with mode:
        with dc.compile_natives as entered:
            counted(torch.randn(4, 3))
        counted(torch.randn(4, 3))
    assert entered is mode
    assert hits(mode) == 2


def test_with_blocks_nest(mode, counted):
    other = dc.DispatchCompileMode(config=EAGER)
    natives = dc.compile_natives(mode=mode)
    with natives, dc.compile_natives(mode=other), natives:
        counted(torch.randn(4, 3))
    assert (hits(mode), hits(other)) == (1, 0)


def test_with_on_two_threads(mode, counted):
    """One object, entered on two threads that leave in the order in which they came."""
    import threading

    natives, entered, leave = dc.compile_natives(mode=mode), threading.Event(), threading.Event()
    errors = []

    def other() -> None:
        try:
            with natives:
                entered.set()
                leave.wait()
                counted(torch.randn(4, 3))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    with natives:
        thread.start()
        entered.wait()
    leave.set()
    thread.join()
    assert not errors
    assert hits(mode) == 1


def test_bare_with_on_two_threads_that_differ(counted, mode):
    """The shared object must leave on each thread what that thread entered."""
    import threading

    entered, leave, errors = threading.Event(), threading.Event(), []

    def other() -> None:
        try:
            with dc.compile_natives:  # the default mode, for there is none on this thread
                entered.set()
                leave.wait()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    with mode:
        with dc.compile_natives:
            thread.start()
            entered.wait()
        counted(torch.randn(4, 3))
    leave.set()
    thread.join()
    assert not errors
    assert hits(mode) == 1
    counted(torch.randn(4, 3))
    assert hits(mode) == 1


# ---- Errors


def test_mode_and_config():
    with pytest.raises(TypeError, match="give mode= or config="):
        dc.compile_natives(mode=dc.DispatchCompileMode(), config=EAGER)


def test_mode_of_the_wrong_type():
    with pytest.raises(TypeError, match="mode must be a DispatchCompileMode, not 'inductor'"):
        dc.compile_natives(mode="inductor")


def test_config_of_the_wrong_type():
    with pytest.raises(TypeError, match="config must be a CompileConfig"):
        dc.compile_natives(config={"backend": "eager"})


@pytest.mark.parametrize("thing", [3, "body", torch.ones(2), torch.nn.Linear])
def test_decorating_what_is_no_function(thing):
    for decorate in (dc.compile_natives, dc.compile_natives(mode=dc.DispatchCompileMode()), dc.inherit_modes):
        with pytest.raises(TypeError, match="is not a function"):
            decorate(thing)


async def coroutine() -> None: ...


def generator() -> Iterator[None]:
    yield


async def async_generator() -> AsyncIterator[None]:
    yield


class AsyncCallable:
    async def __call__(self) -> None: ...

    async def method(self) -> None: ...


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        (coroutine, "an async function"),
        (generator, "a generator function"),
        (async_generator, "an async generator function"),
        (functools.partial(coroutine), "an async function"),
        (torch.inference_mode()(coroutine), "an async function"),
        (contextmanager(generator), "a generator function"),
        (AsyncCallable(), "an async function"),
        (AsyncCallable().method, "an async function"),
    ],
)
def test_decorating_what_runs_after_the_call(fn, kind):
    """The mode would be left before anything runs in it."""
    for decorate in (dc.compile_natives, dc.compile_natives(mode=dc.DispatchCompileMode()), dc.inherit_modes):
        with pytest.raises(
            TypeError, match=rf"is {kind}, whose body runs after the call has returned; write `with mode:`"
        ):
            decorate(fn)
