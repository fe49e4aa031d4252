"""Ops that come back under the name of one that is gone, as in a notebook."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch
from support import EAGER
from torch import Tensor

import dispatch_compile as dc
from dispatch_compile._dispatch import hooks as _hooks


def test_every_one_is_caught_whenever_the_library_of_the_last_one_is_freed():
    """torch then also forgets the OpOverload objects of the living op, and makes others."""
    for _ in range(8):  # which of two kernels wins is up to the hash of the objects

        def comes_back(x: Tensor) -> Tensor:
            return x * 2

        op = dc.register_op(comes_back)
        try:
            delattr(torch.ops.dispatch_compile, "comes_back")
            torch.ops.dispatch_compile._dir.remove("comes_back")
            assert torch.ops.dispatch_compile.comes_back.default is not op.torch_op
            mode = dc.DispatchCompileMode(config=EAGER, trace=True)
            with mode:
                op(torch.ones(4, 3))
                torch.ops.dispatch_compile.comes_back(torch.ones(5, 3))
            assert [event.new for event in mode.trace.events] == [True, False]
        finally:
            op.unregister()
        del mode
        gc.collect()
        assert "dispatch_compile::comes_back" not in _hooks._hooks


COMES_BACK_WITH_TWO_OVERLOADS = """
import torch
import dispatch_compile as dc
from torch import Tensor

mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"))
for factor in (2, 3, 4, 5):
    def comes_back(x: Tensor) -> Tensor:
        return x * factor

    op = dc.register_op(name="comes_back", allow_inplace=factor != 4)(comes_back)

    @op.register_impl("overwriting", inplace=factor != 4)
    def overwriting(x: Tensor) -> Tensor:
        return x.mul_(factor)

    x = torch.ones(4, 3)
    assert op(x).unique().tolist() == [factor]
    with mode:
        assert op(x).unique().tolist() == [factor]
    if factor != 4:
        with op.set_priority(["overwriting"]):
            assert op.maybe_inplace(x) is x
        with mode:
            assert op.maybe_inplace(torch.ones(4, 3)).unique().tolist() == [factor]
    op.unregister()
print(mode.cache.stats())
"""


def test_an_op_with_two_overloads():
    """In a process of its own, which may crash."""
    run = subprocess.run(
        [sys.executable, "-c", COMES_BACK_WITH_TWO_OVERLOADS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "compiles=4, hits=7" in run.stdout


def test_an_op_with_two_overloads_cannot_come_back_with_another_schema():
    def doubled(x: Tensor) -> Tensor:
        return x * 2

    def scaled(x: Tensor, factor: float) -> Tensor:
        return x * factor

    def register(native, **options):
        return dc.register_op(name="two_overloads_come_back", **options)(native)

    register(doubled, allow_inplace=True).unregister()
    for options in ({}, {"allow_inplace": True}):
        with pytest.raises(ValueError, match=r"cannot change its schema; use another name(.|\n)*factor"):
            register(scaled, **options)
    assert "two_overloads_come_back" not in dc.IrOp.registry
    op = register(doubled)
    assert op(torch.ones(2)).tolist() == [2.0, 2.0]
    assert op.maybe_inplace is None
    op.unregister()
