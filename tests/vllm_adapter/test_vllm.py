"""The real vLLM IR ops, inside an opaque custom op, against vLLM's own native implementations."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from contextlib import nullcontext

import pytest
import torch
from support import EAGER

import dispatch_compile as dc

pytestmark = pytest.mark.vllm
vllm_ir = pytest.importorskip("vllm.ir", reason="needs the real vLLM")

HIDDEN = 256
TOKENS = (0, 1, 2, 7, 64, 1000, 4096)


@pytest.fixture(autouse=True)
def torch_wrapping():
    with vllm_ir.enable_torch_wrap(True), torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def layer():
    """Opaque custom ops whose bodies call vLLM's IR ops."""
    library = torch.library.Library("test_vllm", "FRAGMENT")
    library.define("norm(Tensor x, Tensor weight) -> Tensor")
    library.impl("norm", lambda x, weight: vllm_ir.ops.rms_norm(x, weight, 1e-6), "CompositeExplicitAutograd")
    library.define("add_norm(Tensor x, Tensor residual, Tensor weight) -> (Tensor, Tensor)")
    library.impl(
        "add_norm",
        lambda x, residual, weight: vllm_ir.ops.fused_add_rms_norm(x, residual, weight, 1e-6),
        "CompositeExplicitAutograd",
    )
    library.define("add_norm_inplace(Tensor x, Tensor residual, Tensor weight) -> (Tensor, Tensor)")
    library.impl(
        "add_norm_inplace",
        # Clones: the overload may overwrite its activations, and an op's schema here says that it does not.
        lambda x, residual, weight: vllm_ir.ops.fused_add_rms_norm.maybe_inplace(
            x.clone(), residual.clone(), weight, 1e-6
        ),
        "CompositeExplicitAutograd",
    )
    library.define("activation(Tensor x) -> Tensor")
    library.impl(
        "activation",
        lambda x: vllm_ir.ops.gelu_and_mul_sparse(x, 1.6448536269514722, "tanh"),
        "CompositeExplicitAutograd",
    )
    yield torch.ops.test_vllm
    library._destroy()


def inputs(name: str, tokens: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(torch.bfloat16)

    x, residual, weight = random(tokens, HIDDEN), random(tokens, HIDDEN), random(HIDDEN)
    return {
        "norm": (x, weight),
        "add_norm": (x, residual, weight),
        "add_norm_inplace": (x, residual, weight),
        "activation": (x,),
    }[name]


IR_OP = {
    "norm": "rms_norm",
    "add_norm": "fused_add_rms_norm",
    "add_norm_inplace": "fused_add_rms_norm",
    "activation": "gelu_and_mul_sparse",
}


@pytest.mark.parametrize("priority", [None, ["native"]], ids=["priority unset", "priority set"])
@pytest.mark.parametrize("name", IR_OP)
def test_runs_compiled_and_agrees_with_vllms_native(layer, name, priority):
    op = getattr(layer, name)
    ir_op = getattr(vllm_ir.ops, IR_OP[name])
    mode = dc.DispatchCompileMode(trace=True)
    compiles = {}
    with ir_op.set_priority(priority) if priority else nullcontext():
        for tokens in TOKENS:
            args = inputs(name, tokens)
            expected = op(*args)
            with mode:
                actual = op(*args)
            torch.testing.assert_close(actual, expected, **ir_op.get_tolerance(torch.bfloat16))
            compiles[tokens] = mode.cache.stats().compiles

    assert [event.action for event in mode.trace.events] == ["compiled"] * len(TOKENS)
    assert all(event.depth == 1 for event in mode.trace.events)
    assert mode.cache.stats().hits == len(TOKENS)
    # One for no tokens, one for one token, one for all others.
    assert compiles == {0: 1, 1: 2, 2: 3, 7: 3, 64: 3, 1000: 3, 4096: 3}
    assert len(mode.cache) == 1


def test_overload_is_named_in_the_trace(layer):
    mode = dc.DispatchCompileMode(trace=True)
    with mode:
        layer.add_norm_inplace(*inputs("add_norm_inplace", 2))
    assert [event.op for event in mode.trace.events] == ["vllm_ir::fused_add_rms_norm.maybe_inplace"]


def test_another_provider_passes_untouched(monkeypatch):
    ir_op = vllm_ir.ops.rms_norm
    calls = []

    def handwritten(
        x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> torch.Tensor:
        calls.append(x.shape[0])
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, epsilon)

    monkeypatch.setattr(ir_op, "impls", dict(ir_op.impls))
    ir_op.register_impl("handwritten", supports_args=lambda x, weight, epsilon, variance_size=None: x.shape[0] > 4)(
        handwritten
    )
    mode = dc.DispatchCompileMode(trace=True)
    x, weight = torch.randn(8, HIDDEN), torch.randn(HIDDEN)
    with ir_op.set_priority(["handwritten", "native"]), mode:
        ir_op(x, weight, 1e-6)
        ir_op(x[:4], weight, 1e-6)
    assert calls == [8]
    assert [(e.action, e.provider) for e in mode.trace.events] == [("aside", "handwritten"), ("compiled", "native")]
    assert "handwritten" in mode.trace.events[0].reason


def test_a_listed_inplace_provider_keeps_functional_semantics(monkeypatch):
    ir_op = vllm_ir.ops.fused_add_rms_norm

    def overwriting(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_residual.add_(x)
        x.copy_(torch.nn.functional.rms_norm(x_residual, x.shape[-1:], weight, epsilon))
        return x, x_residual

    monkeypatch.setattr(ir_op, "impls", dict(ir_op.impls))
    ir_op.register_impl("overwriting", inplace=True)(overwriting)
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(providers=("overwriting",)))
    x, residual, weight = torch.randn(8, HIDDEN), torch.randn(8, HIDDEN), torch.randn(HIDDEN)
    before = x.clone(), residual.clone()
    with ir_op.set_priority(["overwriting"]):
        expected = ir_op(x, residual, weight, 1e-6)
        with mode:
            actual = ir_op(x, residual, weight, 1e-6)
    assert mode.cache.stats().compiles == 1
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close((x, residual), before, rtol=0, atol=0)


def register_doubled(ir_module):
    @ir_module.register_op
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    return doubled


def compiled_code(mode: dc.DispatchCompileMode) -> weakref.ref:
    """A weak reference to what the cache holds; Inductor itself keeps the modules that it generated."""
    [entry] = mode.cache._entries.values()
    [table] = entry.tables.values()
    return weakref.ref(table.guarded[0].known.code)


def test_code_is_freed_after_its_op_leaves_the_registry():
    from vllm.ir import op as ir_module

    doubled = register_doubled(ir_module)
    mode = dc.DispatchCompileMode()
    with mode:
        doubled(torch.ones(4, 8))
    assert (mode.cache.stats().compiles, len(mode.cache)) == (1, 1)
    code = compiled_code(mode)
    gc.collect()
    assert code() is not None

    del ir_module.IrOp.registry["doubled"], doubled
    gc.collect()
    assert code() is None
    assert len(mode.cache) == 0


def test_an_op_that_leaves_the_registry_is_no_longer_caught():
    from vllm.ir import op as ir_module

    tripled = ir_module.register_op(name="tripled")(native_of_tripled)
    mode = dc.DispatchCompileMode(trace=True)
    with mode:
        tripled(torch.ones(4, 8))
    del ir_module.IrOp.registry["tripled"]
    with mode:
        tripled(torch.ones(4, 8))
    assert len(mode.trace.events) == 1
    assert mode.cache.stats().hits == 1


def test_an_op_that_comes_back_under_its_name_is_caught(monkeypatch):
    from vllm.ir import op as ir_module

    mode = dc.DispatchCompileMode(config=EAGER, trace=True)
    for _ in range(2):
        library = torch.library.Library("vllm_ir", "FRAGMENT")  # its own, to be taken away
        monkeypatch.setattr(ir_module, "vllm_ir_torch_lib", library)
        comes_back = ir_module.register_op(name="comes_back")(native_of_tripled)
        with mode:
            comes_back(torch.ones(4, 8))
        assert mode.routes["vllm_ir::comes_back"].op() is comes_back
        del ir_module.IrOp.registry["comes_back"]
        library._destroy()
    assert [event.new for event in mode.trace.events] == [True, True]


def native_of_tripled(x: torch.Tensor) -> torch.Tensor:
    return x * 3


def test_vllm_ops_can_be_selected_by_namespace():
    mode = dc.DispatchCompileMode(ops=["vllm_ir"])
    x = torch.randn(4, HIDDEN)
    with mode:
        vllm_ir.ops.rms_norm(x, None, 1e-6)
        dc.ops.rms_norm(x, None, 1e-6)
    assert mode.cache.stats().hits == 1


def test_importing_the_package_does_not_import_vllm():
    code = "import sys, dispatch_compile; print('vllm' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# ---- Fused


@pytest.fixture
def outer(define_ir_op):
    def norm_and_double(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return vllm_ir.ops.rms_norm(x, weight, 1e-6) * 2

    return define_ir_op(norm_and_double)


@pytest.mark.parametrize("wrapping", [True, False])
def test_what_an_implementation_calls_is_fused_and_its_priority_guarded(outer, wrapping, monkeypatch):
    ir_op = vllm_ir.ops.rms_norm
    monkeypatch.setattr(ir_op, "impls", dict(ir_op.impls))
    ir_op.register_impl("doubling", supports_args=lambda x, weight, epsilon, variance_size=None: x.shape[0] > 16)(
        doubling
    )
    x, weight = torch.randn(32, HIDDEN), torch.randn(HIDDEN)
    expected = vllm_ir.ops.rms_norm(x, weight, 1e-6)
    mode = dc.DispatchCompileMode(config=EAGER, trace=True)
    with vllm_ir.enable_torch_wrap(wrapping), mode:
        for _ in range(2):
            torch.testing.assert_close(outer(x, weight), expected * 2)
            with ir_op.set_priority(["doubling", "native"]):
                torch.testing.assert_close(outer(x, weight), expected * 4)
                torch.testing.assert_close(outer(x[:8], weight), expected[:8] * 2)
    events = [event for event in mode.trace.events if event.op.startswith("dispatch_compile::")]
    assert [event.fuses for event in events] == [("vllm_ir::rms_norm",), (), ("vllm_ir::rms_norm",)] * 2
    assert mode.cache.stats().compiles == 3


def doubling(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    return vllm_ir.ops.rms_norm.impls["native"].impl_fn(x, weight, epsilon, variance_size) * 2


def test_maybe_inplace_is_fused(define_ir_op):
    def add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y, total = vllm_ir.ops.fused_add_rms_norm.maybe_inplace(x * 1, residual * 1, weight, 1e-6)
        return y + total

    op = define_ir_op(add_norm, activations=["x", "residual"])
    args = torch.randn(8, HIDDEN), torch.randn(8, HIDDEN), torch.randn(HIDDEN)
    expected = op(*args)
    mode = dc.DispatchCompileMode(trace=True)
    with mode:
        torch.testing.assert_close(op(*args), expected)
    assert mode.trace.events[0].fuses == ("vllm_ir::fused_add_rms_norm",)
    assert len(mode.trace.events) == 1
