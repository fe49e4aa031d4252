"""Compiling ahead: afterwards no call compiles, at any token count that was warmed up for."""

from __future__ import annotations

import functools

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
    assert (event.action, event.reason) == ("aside", "weight requires grad and grad mode is on")


def test_an_op_that_the_mode_does_not_select(counted):
    mode = dc.DispatchCompileMode(ops=[dc.ops.rms_norm], config=EAGER)
    with pytest.raises(ValueError, match=rf"does not catch dispatch_compile\.{counted.op.name}"):
        mode.warmup(counted.op, torch.randn(4, 3))


def test_an_op_that_does_not_exist(mode):
    with pytest.raises(ValueError, match="warmup: no op 'nowhere::nothing'"):
        mode.warmup("nowhere::nothing", torch.randn(4, 3))


def test_token_counts_that_make_no_sense(mode, counted):
    with pytest.raises(ValueError, match="a token count must be 0 or more, not -1"):
        mode.warmup(counted.op, torch.randn(4, 3), tokens=[-1])
    with pytest.raises(ValueError, match=r"one number of tokens to replace, but they have \{\}"):
        mode.warmup(counted.op, torch.tensor(1.0), tokens=[4])


def test_activations_with_different_token_counts(mode, define_ir_op):
    def rows(x: Tensor, x_few: Tensor) -> Tensor:
        return x + x_few.sum(0)

    op = define_ir_op(rows)
    with pytest.raises(ValueError, match=r"\{'x': 4, 'x_few': 2\}"):
        mode.warmup(op, torch.randn(4, 3), torch.randn(2, 3), tokens=[8])


# ---- Functions


@pytest.fixture
def negated(define_ir_op):
    def negated(x: Tensor, shift: float = 0.0) -> Tensor:
        return shift - x

    return define_ir_op(negated)


def test_a_function_compiles_all_that_it_calls(mode, counted, negated, define_opaque):
    def body(x: Tensor) -> Tensor:
        return negated(counted(x), 2.0)

    opaque = define_opaque(body)

    def step(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        return opaque(x) + table[positions]

    table = torch.randn(100, 3)
    made = mode.warmup(step, torch.randn(8, 3), torch.arange(8), table, tokens=[1, 8])
    assert [(event.op, event.action) for event in made] == 2 * [
        (f"dispatch_compile::{counted.op.name}.default", "compiled"),
        (f"dispatch_compile::{negated.name}.default", "compiled"),
    ]
    with mode.freeze(), mode:
        for n in (1, 2, 64):
            step(torch.randn(n, 3), torch.arange(n), table)
    assert (mode.cache.stats().compiles, mode.cache.stats().fallbacks) == (4, 0)
    assert not [event for event in mode.trace.events if event.action != "compiled"]


@pytest.mark.parametrize(
    ("fn", "args", "kwargs", "sizes"),
    [
        (lambda w, x: (w, x), (torch.ones(4, 3), torch.ones(5, 3)), {}, (4, 2)),
        (lambda w, y: (w, y), (torch.ones(4, 3), torch.ones(5, 3)), {}, (2, 5)),
        (lambda w, *, x: (w, x), (torch.ones(4, 3),), {"x": torch.ones(5, 3)}, (4, 2)),
        (lambda a, b, c: (a, *b, c["d"]), (1.0, [torch.ones(4)] * 2, {"d": torch.ones(4)}), {}, (2, 2, 2)),
        (lambda x, w, y: (x, w, y), (torch.ones(4), nn.Parameter(torch.ones(4)), torch.ones(4)), {}, (2, 4, 2)),
        (lambda x, n: (x, n), (torch.tensor(1.0), torch.ones(4)), {}, (None, 2)),
    ],
)
def test_the_tensors_with_as_many_rows_are_replaced(fn, args, kwargs, sizes, mode):
    seen: list[Tensor] = []

    @functools.wraps(fn)
    def recording(*args, **kwargs):
        seen.extend(tensor for tensor in fn(*args, **kwargs) if isinstance(tensor, Tensor))

    mode.warmup(recording, *args, tokens=[2], **kwargs)
    assert tuple(tensor.size(0) if tensor.dim() else None for tensor in seen) == sizes


def test_a_function_without_a_signature(mode):
    seen: dict[str, Tensor] = {}
    mode.warmup(seen.update, {"a": torch.ones(4), "b": torch.ones(5)}, c=torch.ones(4), tokens=[2])
    assert {name: len(tensor) for name, tensor in seen.items()} == {"a": 2, "b": 5, "c": 2}


def test_layers_and_custom_ops_are_functions_too(mode, counted):
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, hidden: Tensor) -> Tensor:
            return counted(self.linear(hidden))

    @torch.library.custom_op("dispatch_compile_test::warmed", mutates_args=())
    def warmed(hidden: Tensor) -> Tensor:
        return counted(hidden.double())

    for fn in (Layer(), warmed):
        with torch.no_grad():
            made = mode.warmup(fn, torch.randn(4, 3), tokens=[4, 1])
        assert [event.action for event in made] == ["compiled", "compiled"]
    assert mode.cache.stats().compiles == 4


def test_only_the_modes_own_ops(counted, negated):
    mode = dc.DispatchCompileMode(ops=[negated], config=EAGER)
    [event] = mode.warmup(lambda x: counted(negated(x)), torch.randn(4, 3))
    assert event.op == f"dispatch_compile::{negated.name}.default"


@pytest.mark.parametrize("on_new", ["compile", "background", "native", "raise"])
def test_compiles_whatever_is_done_with_new_calls(on_new, counted):
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", on_new=on_new), trace=True)
    for warmed in (counted.op, lambda x: counted(x.double())):
        [event] = mode.warmup(warmed, torch.randn(4, 3))
        assert event.action == "compiled"
    with mode:
        counted(torch.randn(7, 3))
    assert [event.action for event in mode.trace.events] == ["compiled"]


def test_functions_that_make_no_sense(mode, counted):
    with pytest.raises(ValueError, match="a token count must be 0 or more, not -1"):
        mode.warmup(lambda x: counted(x), torch.randn(4, 3), tokens=[-1])
    with pytest.raises(ValueError, match="none of the arguments is a tensor with a dimension 0"):
        mode.warmup(lambda x: counted(x), torch.tensor(1.0), tokens=[4])
    with pytest.raises(TypeError, match=r"warmup: op must be an OpOverload .* or a function, not 3"):
        mode.warmup(3, torch.tensor(1.0))
    with pytest.raises(ZeroDivisionError):
        mode.warmup(lambda x: 1 / 0, torch.randn(4, 3))
