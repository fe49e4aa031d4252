"""Whatever turns programs into graphs makes the same graph of every op that ships, inside a mode and outside, and what
it makes runs in either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from shipped import BARE, IN_CUSTOM_OP, IN_LIBRARY_OP, SHIPPED, OpaqueOps, tensors_in, with_tensors
from support import EAGER, assert_same, outcome
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

import dispatch_compile as dc

Program = Callable[..., Any]


@pytest.fixture(scope="module")
def opaque_ops() -> Iterator[OpaqueOps]:
    ops = OpaqueOps()
    yield ops
    ops.destroy()


@pytest.fixture(scope="module")
def cache() -> dc.NativeCache:
    return dc.NativeCache()


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


CALLS = 3


def program_of(name: str, opaque_ops: OpaqueOps) -> tuple[Program, list[Tensor]]:
    """A function of tensors that calls an op in each place, :data:`CALLS` times in all, and arguments for it."""
    args = SHIPPED[name].make_args(torch.float32)
    bare, library, custom = (opaque_ops.call(name, place) for place in (BARE, IN_LIBRARY_OP, IN_CUSTOM_OP))

    def program(*tensors: Tensor) -> tuple[Any, ...]:
        values = iter(tensors)
        first, *others = [next(values) if isinstance(arg, Tensor) else arg for arg in args]
        # Fresh arguments, for an overload that may write into them.
        return bare(first + 1, *others), library(first + 2, *others), custom(first + 3, *others)

    return program, tensors_in(args)


class Module(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        return self.program(*tensors)


# ---- Each tracer: the text of the graph, and the graph as a program


def traced_by_make_fx(tracing_mode: str) -> Callable[[Program, list[Tensor]], tuple[str, Program]]:
    def trace(program: Program, tensors: list[Tensor]) -> tuple[str, Program]:
        graph = make_fx(program, tracing_mode=tracing_mode)(*tensors)
        return graph.code, graph

    return trace


def traced_by_export(strict: bool) -> Callable[[Program, list[Tensor]], tuple[str, Program]]:
    def trace(program: Program, tensors: list[Tensor]) -> tuple[str, Program]:
        exported = torch.export.export(Module(program), tuple(tensors), strict=strict)
        return f"{exported.graph_module.code}{exported.graph_signature}", exported.module()

    return trace


def traced_and_decomposed(program: Program, tensors: list[Tensor]) -> tuple[str, Program]:
    exported = torch.export.export(Module(program), tuple(tensors), strict=False).run_decompositions()
    return f"{exported.graph_module.code}{exported.graph_signature}", exported.module()


def traced_by_jit(program: Program, tensors: list[Tensor]) -> tuple[str, Program]:
    traced = torch.jit.trace(program, tuple(tensors))
    return str(traced.graph), traced


def traced_by_fx(program: Program, tensors: list[Tensor]) -> tuple[str, Program]:
    # Proxies must have names.
    named = {1: lambda a: program(a), 2: lambda a, b: program(a, b), 3: lambda a, b, c: program(a, b, c)}
    graph = torch.fx.symbolic_trace(named[len(tensors)])
    return graph.code, graph


def traced_by_dynamo(program: Program, tensors: list[Tensor]) -> tuple[str, Program]:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Program:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    compiled = torch.compile(program, backend=backend, fullgraph=True)
    compiled(*tensors)
    return "".join(graphs), compiled


@dataclass(frozen=True)
class Tracer:
    trace: Callable[[Program, list[Tensor]], tuple[str, Program]]
    runs_the_ops: bool = False  # whether tracing computes the results too
    slow: bool = False


TRACERS = {
    "make_fx": Tracer(traced_by_make_fx("real"), runs_the_ops=True),
    "make_fx with fake tensors": Tracer(traced_by_make_fx("fake")),
    "make_fx with symbols": Tracer(traced_by_make_fx("symbolic"), slow=True),
    "export": Tracer(traced_by_export(strict=False)),
    "export, strict": Tracer(traced_by_export(strict=True), slow=True),
    "export, decomposed": Tracer(traced_and_decomposed, slow=True),
    "jit.trace": Tracer(traced_by_jit, runs_the_ops=True),
    "fx.symbolic_trace": Tracer(traced_by_fx),
    "torch.compile": Tracer(traced_by_dynamo, runs_the_ops=True),
}
FOR_SLOW_TRACERS = ["fused_add_rms_norm.maybe_inplace"]  # the richest schema


@pytest.mark.parametrize(
    ("by", "name"),
    [(by, name) for by, tracer in TRACERS.items() for name in (FOR_SLOW_TRACERS if tracer.slow else SHIPPED)],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore:.*LeafSpec")
@pytest.mark.selective
def test_the_graph_is_the_same(by, name, opaque_ops, cache):
    tracer = TRACERS[by]
    program, tensors = program_of(name, opaque_ops)
    expected = program(*tensors)
    alone, traced_alone = tracer.trace(program, tensors)
    torch._dynamo.reset()
    mode, before = dc.DispatchCompileMode(config=EAGER, cache=cache, trace=True), cache.stats()
    with mode:
        beside, traced_beside = tracer.trace(program, tensors)
    assert beside == alone
    assert alone.count(name.partition(".")[0]) >= CALLS
    assert {event.action for event in mode.trace.events} == ({"compiled"} if tracer.runs_the_ops else set())
    assert cache.stats().hits - before.hits == len(mode.trace)
    for traced in (traced_alone, traced_beside):
        assert_same(traced(*tensors), expected)
        before = cache.stats()
        with mode:
            assert_same(traced(*tensors), expected)
        assert cache.stats().hits - before.hits == CALLS


# ---- torch.compile


@pytest.mark.parametrize(
    ("fullgraph", "name"),
    [(True, name) for name in SHIPPED] + [(False, name) for name in ("silu_and_mul", "quant_fp8_per_token")],
    ids=lambda value: {True: "fullgraph", False: "graph break"}.get(value, value),
)
def test_a_model_is_compiled_once_for_inside_and_outside(fullgraph, name, opaque_ops, cache):
    program, tensors = program_of(name, opaque_ops)

    def model(*tensors: Tensor) -> tuple[Any, ...]:
        first, *others = tensors
        if not fullgraph:
            torch._dynamo.graph_break()
        return program(first.sin(), *others)

    expected, mode = model(*tensors), dc.DispatchCompileMode(config=EAGER, cache=cache)
    for compiled_inside in (False, True):
        torch._dynamo.reset()
        counter, before = CompileCounter(), cache.stats()
        compiled = torch.compile(model, backend=counter, fullgraph=fullgraph)
        for inside in (compiled_inside, not compiled_inside, compiled_inside):
            with mode if inside else nullcontext():
                assert_same(compiled(*tensors), expected)
        assert counter.frame_count == 1
        after, inside_calls = cache.stats(), 2 if compiled_inside else 1
        assert after.hits - before.hits == inside_calls * CALLS


@pytest.mark.parametrize("name", ["rms_norm", "gelu_and_mul"])
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_a_compiled_training_step(name, opaque_ops):
    """torch.compile has no gradient for an IR op, and says so; all else has one."""
    op, args = opaque_ops.call(name, BARE), SHIPPED[name].make_args(torch.float32)
    leaf, others = args[0].clone().requires_grad_(), tensors_in(args)[1:]

    def step() -> Any:
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x: (op(*with_tensors(args, [x.sin(), *others])), x.cos()), backend="aot_eager", fullgraph=True
        )
        return [
            (result, outcome(torch.autograd.grad, result.sum(), leaf, retain_graph=True)) for result in compiled(leaf)
        ]

    expected = step()
    mode = dc.DispatchCompileMode(config=EAGER, trace=True)
    with mode:
        assert_same(step(), expected)
    assert [event.action for event in mode.trace.events] == ["compiled"]


def test_an_op_that_the_outer_compiler_folds():
    """With frozen parameters Inductor runs the op while it compiles: one compilation inside the other."""
    rms_norm = dc.ops.rms_norm.torch_op

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x @ rms_norm(self.weight, None, 1e-6).t()

    model, x, mode = Frozen().eval(), torch.randn(3, 16), dc.DispatchCompileMode(trace=True)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        expected = torch.compile(model)(x)
        torch._dynamo.reset()
        compiled = torch.compile(model)
        with mode:
            for _ in range(2):
                torch.testing.assert_close(compiled(x), expected)
    assert [event.action for event in mode.trace.events] == ["compiled"], "it is not called again"


# ---- TorchScript


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_torchscript_calls_compiled_code():
    @torch.jit.script
    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.dispatch_compile.rms_norm(x.sin(), weight, 1e-6)

    x, weight, mode = torch.randn(4, 16), torch.randn(16), dc.DispatchCompileMode(config=EAGER)
    expected = run(x, weight)
    with mode:
        for _ in range(4):  # the profiling executor makes other code of the second
            assert_same(run(x, weight), expected)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 4)
    assert_same(run(x, weight), expected)
