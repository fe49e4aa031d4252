"""vLLM's own priority decides which implementation of an IR op a mode compiles, also by ``IrOpPriorityConfig``."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs the real vLLM")

import torch
import vllm.ir
from support import EAGER
from torch import Tensor
from vllm.config.kernel import IrOpPriorityConfig
from vllm.ir.op import IrOp
from vllm_support import made

import dispatch_compile as dc

pytestmark = pytest.mark.vllm

NORMS = {
    "rms_norm": lambda: (vllm.ir.ops.rms_norm, (torch.randn(4, 8), None, 1e-6)),
    "fused_add_rms_norm": lambda: (vllm.ir.ops.fused_add_rms_norm, (torch.randn(4, 8), torch.randn(4, 8), None, 1e-6)),
    "maybe_inplace": lambda: (
        vllm.ir.ops.fused_add_rms_norm.maybe_inplace,
        (torch.randn(4, 8), torch.randn(4, 8), None, 1e-6),
    ),
}


@pytest.fixture(autouse=True)
def torch_wrapping():
    with vllm.ir.enable_torch_wrap(True):
        yield


@pytest.fixture
def out_of_tree(monkeypatch):
    """Implementations from outside of vLLM, as a platform's plugin registers them: ``providers -> runs as Python``."""
    runs = []

    def oot_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
        runs.append("rms_norm")
        return vllm.ir.ops.rms_norm.impls["native"].impl_fn(x, weight, epsilon, variance_size)

    def oot_add_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        runs.append("fused_add_rms_norm")
        x_residual.copy_(x + x_residual)
        x.copy_(vllm.ir.ops.rms_norm.impls["native"].impl_fn(x_residual, weight, epsilon, variance_size))
        return x, x_residual

    for op, fn, inplace in (
        (vllm.ir.ops.rms_norm, oot_norm, False),
        (vllm.ir.ops.fused_add_rms_norm, oot_add_norm, True),
    ):
        monkeypatch.setattr(op, "impls", dict(op.impls))
        op.register_impl("out_of_tree", inplace=inplace)(fn)
    return runs


def first_choice(provider: str) -> IrOpPriorityConfig:
    others = {name: ["native"] for name in IrOp.registry if name not in ("rms_norm", "fused_add_rms_norm")}
    return IrOpPriorityConfig.with_default([provider, "native"], **others)


@pytest.fixture(autouse=True)
def priorities_restored(monkeypatch):
    for op in IrOp.registry.values():
        monkeypatch.setattr(op, "_priority_impls", op._priority_impls)


@pytest.mark.parametrize("permanently", [False, True], ids=["set_priority", "set_default"])
@pytest.mark.parametrize("name", NORMS)
def test_vllms_configuration_decides(out_of_tree, name, permanently):
    """Native runs compiled; an out-of-tree implementation passes; and back again."""
    op, args = NORMS[name]()
    mode = dc.DispatchCompileMode(config=EAGER, trace=True)
    for provider in ("native", "out_of_tree", "native"):
        config = made(lambda provider=provider: first_choice(provider))
        with mode:
            if permanently:
                config.set_default()
                op(*args)
            else:
                with config.set_priority():
                    op(*args)
    assert [(event.provider, event.action) for event in mode.trace.events] == [
        ("native", "compiled"),
        ("out_of_tree", "aside"),
        ("native", "compiled"),
    ]
    assert len(out_of_tree) == 1
    assert mode.cache.stats().compiles == 1


@pytest.mark.parametrize("name", NORMS)
def test_an_out_of_tree_implementation_is_compiled_if_it_is_listed(out_of_tree, name):
    op, args = NORMS[name]()
    before = [value.clone() if isinstance(value, Tensor) else value for value in args]
    mode = dc.DispatchCompileMode(
        config=dc.CompileConfig(backend="eager", providers=("native", "out_of_tree")), trace=True
    )
    with made(lambda: first_choice("out_of_tree")).set_priority(), mode:
        op(*args)
        runs = len(out_of_tree)
        actual = op(*args)
    expected = getattr(op, "op", op).impls["native"].impl_fn(*before)
    torch.testing.assert_close(actual, expected)
    assert [(event.provider, event.action) for event in mode.trace.events] == [("out_of_tree", "compiled")] * 2
    assert len(out_of_tree) == runs, "the second call ran compiled code"
    torch.testing.assert_close([value for value in args if isinstance(value, Tensor)], before[: len(before) - 2])


def test_every_op_of_the_registry_is_caught_in_every_overload():
    from dispatch_compile._ir import registry as _registry

    mode = dc.DispatchCompileMode()
    with mode:
        pass
    overloads = {overload.name() for op in IrOp.registry.values() for overload in _registry.overloads(op)}
    assert "vllm_ir::fused_add_rms_norm.maybe_inplace" in overloads
    assert overloads <= set(mode.routes)
