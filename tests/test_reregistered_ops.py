"""Ops that come back under the name of one that is gone, as in a notebook."""

from __future__ import annotations

import gc

import torch
from support import EAGER
from torch import Tensor

import dispatch_compile as dc
from dispatch_compile import _hooks


def test_every_one_is_caught_whenever_the_library_of_the_last_one_is_freed():
    """torch then also forgets the OpOverload objects of the living op, and makes others."""
    for _ in range(8):  # which of two kernels wins is up to the hash of the objects

        def comes_back(x: Tensor) -> Tensor:
            return x * 2

        op = dc.register_op(comes_back)
        try:
            delattr(torch.ops.dispatch_compile, "comes_back")
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
