"""Which namespaces count as torch's own: those that a fresh process has after importing torch and its compilers."""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from torch import Tensor

from dispatch_compile._dispatch import opaque as _opaque

LIST_NAMESPACES = """
import json, torch, torch._dynamo, torch._inductor.compile_fx
print(json.dumps(sorted({name.partition("::")[0] for name in torch._C._dispatch_get_all_op_names()})))
"""


def test_namespaces_of_torch():
    run = subprocess.run([sys.executable, "-c", LIST_NAMESPACES], capture_output=True, text=True, check=True)
    found = set(json.loads(run.stdout.splitlines()[-1]))
    assert "aten" in found
    assert found - _opaque.TORCH_NAMESPACES == set(), "torch registers ops in namespaces that are taken for opaque"


def test_ops_of_libraries_are_opaque(define_opaque):
    def body(x: Tensor) -> Tensor:
        return x * 2

    op = define_opaque(body)
    assert op in _opaque.opaque_overloads()


def test_ops_of_torch_are_not():
    assert {op.namespace for op in _opaque.opaque_overloads()} & _opaque.TORCH_NAMESPACES == set()
    assert torch.ops.aten.mul.Tensor not in _opaque.opaque_overloads()


def test_decomposing_ops_are_not(define_opaque):
    def body(x: Tensor) -> Tensor:
        return x * 2

    assert define_opaque(body, key="CompositeImplicitAutograd") not in _opaque.opaque_overloads()


def test_ops_that_select_their_backend_are_not(define_opaque):
    def body(x: Tensor) -> Tensor:
        return x * 2

    op = define_opaque(body)
    library = torch.library.Library(op.namespace, "IMPL")
    library.impl(op.name().partition("::")[2], lambda x: x, "BackendSelect")
    try:
        assert op not in _opaque.opaque_overloads()
    finally:
        library._destroy()
