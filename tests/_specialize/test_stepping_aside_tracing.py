"""Beside everything that traces programs, a mode changes nothing: torch.compile, torch.export, make_fx, and the
fake, meta and wrapped tensors that they and others work with."""

from __future__ import annotations

import pytest
import torch
from support import EAGER, assert_same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import dispatch_compile as dc


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def mode():
    return dc.DispatchCompileMode(config=EAGER)


@pytest.fixture
def model(counted, define_opaque):
    """A layer with an IR op of its own and one inside an opaque op."""

    def body(x: Tensor) -> Tensor:
        return counted(x.sin()).cos()

    opaque = define_opaque(body, fake=lambda x: torch.empty_like(x))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return opaque(self.linear(x)).relu() + counted(x)

    return Layer().requires_grad_(False)


class RecordingBackend:
    def __init__(self) -> None:
        self.graphs: list[str] = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph.print_readable(print_output=False))
        return graph.forward


def test_outer_compile_captures_the_same_graph(model, mode):
    x, alone, beside = torch.randn(3, 4), RecordingBackend(), RecordingBackend()
    expected = torch.compile(model, backend=alone, fullgraph=True)(x)
    torch._dynamo.reset()
    with mode:
        assert_same(torch.compile(model, backend=beside, fullgraph=True)(x), expected)
    assert beside.graphs == alone.graphs
    assert len(alone.graphs) == 1
    assert "dispatch_compile_test.body" in alone.graphs[0]


def test_ir_ops_in_opaque_ops_of_a_compiled_model_run_compiled(model, mode, counted):
    x, backend = torch.randn(3, 4), RecordingBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with mode:
        compiled(x)
        runs = counted.python_runs
        compiled(x)
    assert counted.python_runs == runs
    assert mode.cache.stats().hits == 4


def test_model_compiled_before_is_not_recompiled_inside(model, mode, counted):
    x, counter = torch.randn(3, 4), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    expected = compiled(x)
    with mode:
        assert_same(compiled(x), expected)
    assert_same(compiled(x), expected)
    assert counter.frame_count == 1
    assert mode.cache.stats().hits == 2


def test_model_compiled_inside_is_not_recompiled_outside(model, mode):
    x, counter = torch.randn(3, 4), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with mode:
        expected = compiled(x)
    assert_same(compiled(x), expected)
    assert counter.frame_count == 1


def test_outer_compile_with_inductor(model, mode):
    x = torch.randn(3, 4)
    expected = torch.compile(model, fullgraph=True)(x)
    torch._dynamo.reset()
    with mode:
        assert_same(torch.compile(model, fullgraph=True)(x), expected)
    assert mode.cache.stats().hits == 2


def test_outer_compile_with_dynamic_shapes(model, mode):
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with mode:
        for tokens in (3, 5, 8):
            x = torch.randn(tokens, 4)
            assert_same(compiled(x), model(x))
    assert counter.frame_count == 1
    assert mode.cache.stats().compiles == 1


def test_outer_compile_of_a_training_step(model, mode):
    x = torch.randn(3, 4, requires_grad=True)

    def step() -> Tensor:
        return torch.autograd.grad(torch.compile(lambda x: (x * 2).sin().sum(), backend="aot_eager")(x), x)[0]

    expected = step()
    torch._dynamo.reset()
    with mode:
        assert_same(step(), expected)


def test_export(model, mode):
    x = torch.randn(3, 4)
    alone = torch.export.export(model, (x,))
    with mode:
        beside = torch.export.export(model, (x,))
    assert beside.graph_module.code == alone.graph_module.code
    assert str(beside.graph_signature) == str(alone.graph_signature)
    assert mode.cache.stats().compiles == 0
    with mode:
        assert_same(beside.module()(x), alone.module()(x))
    assert mode.cache.stats().hits > 0


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_make_fx(tracing, model, mode):
    model.linear = nn.Identity()  # fake tensors go with no real parameters
    x = torch.randn(3, 4)
    alone = make_fx(model, tracing_mode=tracing)(x)
    with mode:
        beside = make_fx(model, tracing_mode=tracing)(x)
    assert beside.code == alone.code
    assert "dispatch_compile_test.body" in alone.code
    assert_same(beside(x), alone(x))
    assert mode.cache.stats().hits == (2 if tracing == "real" else 0)


def test_fake_arguments(counted, mode):
    with FakeTensorMode():
        x = torch.empty(4, 3)
    with mode:
        result = counted(x)
    assert isinstance(result, FakeTensor)
    assert mode.cache.stats() == dc.CacheStats(compiles=0, hits=0, fallbacks=0, asides=0)


def test_meta_arguments(counted, mode):
    x = torch.empty(4, 3, device="meta")
    with mode:
        result = counted(x)
    assert (result.is_meta, result.shape) == (True, (4, 3))
    assert mode.cache.stats().compiles == 0


def test_functionalization(counted, mode):
    def mutating(x: Tensor) -> Tensor:
        y = x.clone()
        y.add_(counted(y))
        return y

    x = torch.randn(4, 3)
    expected = mutating(x)
    with mode:
        assert_same(torch.func.functionalize(mutating)(x), expected)
        graph = make_fx(torch.func.functionalize(mutating))(x)
    assert graph.code == make_fx(torch.func.functionalize(mutating))(x).code


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(counted, mode):
    x = torch.randn(5, 4, 3)
    expected = torch.func.vmap(lambda x: counted(x).sum())(x)
    with mode:
        assert_same(torch.func.vmap(lambda x: counted(x).sum())(x), expected)


def test_func_grad(counted, mode):
    x = torch.randn(4, 3)
    expected = torch.func.grad(lambda x: counted(x).square().sum())(x)
    with mode:
        assert_same(torch.func.grad(lambda x: counted(x).square().sum())(x), expected)


def test_mode_entered_inside_a_compiled_function(counted, mode):
    """Whether Dynamo breaks the graph there or not, the result is right and the op is caught."""
    counter = CompileCounter()

    @torch.compile(backend=counter)
    def run(x: Tensor) -> Tensor:
        with mode:
            return counted(x.sin())

    x = torch.randn(4, 3)
    assert_same(run(x), counted(x.sin()))
    assert mode.cache.stats().hits == 1
