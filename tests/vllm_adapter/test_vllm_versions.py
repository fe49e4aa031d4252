"""A vLLM that has changed where the package reads it is met with an error that names what is missing."""

from __future__ import annotations

import sys
import types

import pytest

pytest.importorskip("vllm", reason="needs the real vLLM")

import torch
import vllm
import vllm.ir.op
from vllm_support import CustomOp

import dispatch_compile as dc

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def disabled():
    yield
    dc.vllm.disable()


@pytest.mark.parametrize("name", ["torch_op", "activations", "dispatch"])
def test_an_ir_op_without_an_attribute(monkeypatch, name):
    owner = vllm.ir.op.IrOp if name == "dispatch" else vllm.ir.ops.rms_norm
    monkeypatch.delattr(owner, name)
    text = rf"^vLLM {vllm.__version__} has no \w*IrOp\w*\.{name}, which .* needs to run vLLM's IR ops compiled\. "
    with pytest.raises(RuntimeError, match=text):
        dc.DispatchCompileMode().__enter__()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (vllm.ir.op.IrOpImpl, "func_impl_fn"),
        (vllm.ir.ops.rms_norm.impls["native"], "provider"),
        (vllm.ir.ops.fused_add_rms_norm.maybe_inplace, "torch_op"),
        (vllm.ir.op.IrOp, "registry"),
        (vllm.ir.op, "IrOp"),
    ],
    ids=["an implementation's method", "its provider", "the inplace overload's op", "the registry", "the class"],
)
def test_other_attributes(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    with pytest.raises(RuntimeError, match=rf"^vLLM {vllm.__version__} has no [\w.]+\.{name}, "):
        dc.DispatchCompileMode().__enter__()


@pytest.mark.parametrize(
    ("owner", "name", "purpose"),
    [
        (CustomOp, "dispatch_forward", "catch its CustomOp layers"),
        (vllm.ir.op.IrOp, "__call__", "catch its IR ops on every thread"),
        (vllm.ir.op, "IrOpInplaceOverload", "catch its IR ops on every thread"),
        (vllm.ir.op, "_ENABLE_TORCH_WRAP", "tell whether its IR ops pass through torch"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_enabling_with_an_attribute_missing_enables_nothing(monkeypatch, owner, name, purpose):
    dispatch_forward = vars(CustomOp)["dispatch_forward"]
    monkeypatch.delattr(owner, name)
    with pytest.raises(RuntimeError, match=rf"has no [\w.]+\.{name}, which dispatch_compile needs to {purpose}"):
        dc.vllm.enable()
    monkeypatch.undo()
    assert vars(CustomOp)["dispatch_forward"] is dispatch_forward
    assert dc.vllm.enable() is not None


def test_without_vllm_ir_the_layers_are_still_caught(monkeypatch):
    """As it is to be: vLLM 0.33.0 says that its IR goes away in 0.34.0."""
    monkeypatch.setitem(sys.modules, "vllm.ir.op", None)
    monkeypatch.delattr(vllm.ir, "op")
    enabled = dc.vllm.enable()
    assert enabled is not None
    with enabled:
        pass


def test_a_vllm_that_is_just_being_imported_has_no_ops_yet(monkeypatch):
    half = types.ModuleType("vllm.ir.op")
    half.__spec__ = types.SimpleNamespace(_initializing=True)
    monkeypatch.setitem(sys.modules, "vllm.ir.op", half)
    mode = dc.DispatchCompileMode()
    with mode:
        torch.ones(1)
    assert not any(name.startswith("vllm_ir::") for name in mode.routes)
