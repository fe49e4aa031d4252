"""How calls are seen: those of IR ops alone, or every op of the thread because a trace asks for it."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from support import EAGER, assert_same
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import dispatch_compile as dc


class PassingOn(TorchDispatchMode):
    """What everybody writes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watching():
    return dc.DispatchCompileMode(config=EAGER, trace=dc.Trace(all_ops=True))


@pytest.fixture
def layer(define_ir_op, define_opaque):
    def seen_scale(x: Tensor) -> Tensor:
        return x * 2

    scale = define_ir_op(seen_scale, name="seen_scale")

    def seen_inner(x: Tensor) -> Tensor:
        return scale(x.sin()).cos()

    inner = define_opaque(seen_inner, name="seen_inner")

    def seen_outer(x: Tensor) -> Tensor:
        return inner(x + 1).relu()

    return define_opaque(seen_outer, name="seen_outer")


@pytest.mark.selective
def test_is_selective_unless_the_trace_asks_for_every_op():
    assert dc.DispatchCompileMode().interception == "selective"
    assert dc.DispatchCompileMode(trace=True).interception == "selective"
    assert dc.DispatchCompileMode(trace=dc.Trace(ids=True)).interception == "selective"


def test_a_trace_of_all_ops_needs_every_op(watching):
    assert watching.interception == "every op"


@pytest.mark.selective
def test_a_selective_mode_is_not_on_torchs_stack():
    with dc.DispatchCompileMode(trace=True):
        assert torch._C._len_torch_dispatch_stack() == 0


def test_every_op_is_seen_at_every_depth(watching, layer):
    with watching:
        layer(torch.ones(4, 3) * 2)
        layer(torch.ones(5, 3))
    assert_expected_inline(
        str(watching.trace),
        """\
aten::ones([4, 3], device=device(type='cpu'), pin_memory=False)  ->  t: f32[4, 3]
aten::mul.Tensor(t: f32[4, 3], 2)  ->  t: f32[4, 3]
dispatch_compile_test::seen_outer(t: f32[4, 3])  ->  t: f32[4, 3]
  aten::add.Tensor(t: f32[4, 3], 1)  ->  t: f32[4, 3]
  dispatch_compile_test::seen_inner(t: f32[4, 3])  ->  t: f32[4, 3]
    aten::sin(t: f32[4, 3])  ->  t: f32[4, 3]
    dispatch_compile::seen_scale(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, new: [s0, 3]
    aten::cos(t: f32[4, 3])  ->  t: f32[4, 3]
  aten::relu(t: f32[4, 3])  ->  t: f32[4, 3]
aten::ones([5, 3], device=device(type='cpu'), pin_memory=False)  ->  t: f32[5, 3]
dispatch_compile_test::seen_outer(t: f32[5, 3])  ->  t: f32[5, 3]
  aten::add.Tensor(t: f32[5, 3], 1)  ->  t: f32[5, 3]
  dispatch_compile_test::seen_inner(t: f32[5, 3])  ->  t: f32[5, 3]
    aten::sin(t: f32[5, 3])  ->  t: f32[5, 3]
    dispatch_compile::seen_scale(t: f32[5, 3])  ->  t: f32[5, 3]  # compiled native, reused: [s0, 3]
    aten::cos(t: f32[5, 3])  ->  t: f32[5, 3]
  aten::relu(t: f32[5, 3])  ->  t: f32[5, 3]""",
    )
    assert watching.cache.stats().hits == 2


def test_other_ops_can_be_hidden_again(watching, layer):
    with watching:
        layer(torch.ones(4, 3))
        torch.ones(2).sin()
    plain = dc.DispatchCompileMode(config=EAGER, cache=watching.cache, trace=True)
    with plain:
        layer(torch.ones(4, 3))
    hidden = watching.trace.text(all_ops=False)
    assert hidden == str(plain.trace).replace("reused", "new")
    assert hidden.count("\n") == 2


def test_the_body_of_what_runs_eagerly_is_seen(watching, define_ir_op):
    def seen_noise(x: Tensor) -> Tensor:
        return x + torch.rand_like(x)

    op = define_ir_op(seen_noise, name="seen_noise")
    with watching:
        op(torch.zeros(2))
    assert_expected_inline(
        watching.trace.text(),
        """\
aten::zeros([2], device=device(type='cpu'), pin_memory=False)  ->  t: f32[2]
dispatch_compile::seen_noise(t: f32[2])  ->  t: f32[2]  # aside native, the implementation draws random numbers (aten.rand_like.default)
  aten::rand_like(t: f32[2], pin_memory=False)  ->  t: f32[2]
  aten::add.Tensor(t: f32[2], t: f32[2])  ->  t: f32[2]""",  # noqa: E501 - a line of a trace is as long as it is
    )


@pytest.mark.parametrize("where", ["directly", "in an opaque op"])
def test_compiled_functions_stay_compiled(where, watching, define_opaque):
    counter = CompileCounter()
    compiled = torch.compile(lambda x: x.sin() + 1, backend=counter)

    def seen_body(x: Tensor) -> Tensor:
        return compiled(x)

    call = compiled if where == "directly" else define_opaque(seen_body)
    torch._dynamo.reset()
    with watching:
        call(torch.ones(3))
        call(torch.ones(3))
    assert counter.frame_count == 1


def test_any_other_mode_silently_turns_torch_compile_off():
    counter = CompileCounter()
    torch._dynamo.reset()
    with PassingOn():
        torch.compile(lambda x: x.sin() + 1, backend=counter)(torch.ones(3))
    assert counter.frame_count == 0, "torch now compiles inside any mode, so README's comparison is out of date"


def test_gradients_through_bodies_are_lost_as_in_any_mode(watching, counted):
    """torch runs what a mode on its stack handles below autograd."""
    x = torch.ones(3, requires_grad=True)

    def differentiable() -> bool:
        return "Backward" in type(counted(x).grad_fn).__name__

    assert differentiable()
    with PassingOn():
        assert not differentiable()
    with watching:
        assert not differentiable()


@pytest.mark.parametrize("depth", [1, 2])
def test_left_behind_nothing(depth, watching, layer):
    x = torch.ones(4, 3)
    expected = layer(x)
    for _ in range(2):
        with watching:
            if depth == 2:
                with watching:
                    assert_same(layer(x), expected)
            assert_same(layer(x), expected)
        assert torch._C._len_torch_dispatch_stack() == 0
    assert len(watching.trace.events) == 2 * depth


def test_an_error_in_a_body_leaves_nothing_behind(watching, define_opaque):
    def failing(x: Tensor) -> Tensor:
        return x.view(7)

    op = define_opaque(failing)
    with watching, pytest.raises(RuntimeError, match="invalid for input"):
        op(torch.ones(3))
    assert torch._C._len_torch_dispatch_stack() == 0
    assert [call.result for call in watching.trace.calls][-2:] == [None, None]


@pytest.mark.selective
def test_a_mode_that_does_not_select_the_op_leaves_the_short_cut_to_the_one_outside(counted, define_ir_op, monkeypatch):
    other = define_ir_op(tripled)
    outside = dc.DispatchCompileMode(config=EAGER)
    inside = dc.DispatchCompileMode(ops=[other], config=EAGER)
    native = dc.native(tripled)
    x = torch.ones(4, 3)
    with outside, inside:
        counted(x)
        native(x)
        monkeypatch.setattr("dispatch_compile._call.kernel._intercept", None)
        monkeypatch.setattr("dispatch_compile._native.run_function", None)
        counted(x)
        native(x)
    assert (outside.cache.stats().hits, inside.cache.stats().hits) == (4, 0)


def test_no_short_cut_through_a_mode_that_was_left(counted):
    outside, inside = (dc.DispatchCompileMode(config=EAGER) for _ in range(2))
    outside.__enter__()
    counted(torch.ones(4, 3))
    with inside:
        outside.__exit__(None, None, None)
        counted(torch.ones(4, 3))
    assert (outside.cache.stats().hits, inside.cache.stats().hits) == (1, 1)


def tripled(x: torch.Tensor) -> torch.Tensor:
    return x * 3
