"""Compiling ahead: afterwards no call compiles, at any token count that was warmed up for."""

from __future__ import annotations

import pytest
import torch
from support import EAGER, specializations
from torch import Tensor, nn

import dispatch_compile as dc


@pytest.fixture
def mode():
    return dc.DispatchCompileMode(config=EAGER, trace=True)


def test_serves_every_token_count(mode, counted):
    made = mode.warmup(counted.op, torch.randn(8, 3), tokens=[1, 8])
    assert [event.specialization for event in made] == ["[1, 3]", "[s0, 3]"]
    assert all(event.new for event in made)
    runs = counted.python_runs
    with mode:
        for tokens in (1, 2, 8, 100):
            counted(torch.randn(tokens, 3))
    assert counted.python_runs == runs
    assert mode.cache.stats().compiles == 2


def test_is_not_in_the_modes_own_trace(mode, counted):
    mode.warmup(counted.op, torch.randn(8, 3))
    assert mode.trace.events == []


def test_without_tokens_makes_the_call_as_it_is(mode, counted):
    [event] = mode.warmup(counted.op, torch.randn(4, 3), 3.0)
    assert (event.arguments, event.action) == ("t: f32[4, 3], 3.0", "compiled")


@pytest.mark.parametrize(
    "named",
    [
        lambda op: op,
        lambda op: op.torch_op,
        lambda op: op.torch_op.overloadpacket,
        lambda op: f"dispatch_compile::{op.name}",
    ],
    ids=["IrOp", "OpOverload", "OpOverloadPacket", "name"],
)
def test_ways_to_name_the_op(named, mode, counted):
    [event] = mode.warmup(named(counted.op), torch.randn(4, 3))
    assert event.action == "compiled"


def test_the_inplace_overload_changes_no_argument(mode, define_ir_op):
    def negate(x: Tensor) -> Tensor:
        return -x

    op = define_ir_op(negate, allow_inplace=True)
    op.register_impl("overwriting", inplace=True)(_negate_inplace)
    x = torch.ones(4, 3)
    with op.set_priority(["overwriting"]):
        made = mode.warmup(op.maybe_inplace, x, tokens=[4])
    assert [event.op for event in made] == [f"dispatch_compile::{op.name}.maybe_inplace"]
    assert x.tolist() == [[1.0] * 3] * 4


def _negate_inplace(x: Tensor) -> Tensor:
    return x.neg_()


def test_layouts_are_kept(mode, define_ir_op):
    def double(x: Tensor) -> Tensor:
        return x * 2

    op = define_ir_op(double)
    strided = torch.randn(4, 6)[:, :3]
    mode.warmup(op, strided, tokens=[16])
    with mode:
        op(torch.randn(7, 6)[:, :3])
        assert mode.cache.stats().compiles == 1
        op(torch.randn(7, 3))
        assert mode.cache.stats().compiles == 2


@pytest.mark.parametrize("inference", [False, True])
def test_inference_tensors(inference, mode, counted):
    with torch.inference_mode(inference):
        x = torch.randn(4, 3)
        mode.warmup(counted.op, x, tokens=[16])
        with mode:
            counted(torch.randn(5, 3))
    assert mode.cache.stats().compiles == 1
    assert len(specializations(mode, counted.op)) == 1


def test_says_why_a_call_would_not_run_compiled(mode):
    with torch.enable_grad():
        [event] = mode.warmup(dc.ops.rms_norm, torch.randn(4, 8), nn.Parameter(torch.ones(8)), 1e-6, tokens=[2])
    assert (event.action, event.reason) == ("passed", "weight requires grad and grad mode is on")


def test_an_op_that_the_mode_does_not_select(counted):
    mode = dc.DispatchCompileMode(ops=[dc.ops.rms_norm], config=EAGER)
    with pytest.raises(ValueError, match=rf"does not catch dispatch_compile\.{counted.op.name}"):
        mode.warmup(counted.op, torch.randn(4, 3))


def test_an_op_that_does_not_exist(mode):
    with pytest.raises(ValueError, match="warmup: no op 'nowhere::nothing'"):
        mode.warmup("nowhere::nothing", torch.randn(4, 3))


def test_token_counts_that_make_no_sense(mode, counted):
    with pytest.raises(ValueError, match="tokens must be 0 or more, not -1"):
        mode.warmup(counted.op, torch.randn(4, 3), tokens=[-1])
    with pytest.raises(ValueError, match=r"one number of tokens to replace, but they have \{\}"):
        mode.warmup(counted.op, torch.tensor(1.0), tokens=[4])


def test_activations_with_different_token_counts(mode, define_ir_op):
    def rows(x: Tensor, x_few: Tensor) -> Tensor:
        return x + x_few.sum(0)

    op = define_ir_op(rows)
    with pytest.raises(ValueError, match=r"\{'x': 4, 'x_few': 2\}"):
        mode.warmup(op, torch.randn(4, 3), torch.randn(2, 3), tokens=[8])
