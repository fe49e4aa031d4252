"""Compiled code rounds where the native implementation does, wherever leaving it out could be seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dispatch_compile as dc


def cancelling(x: Tensor, factor: Tensor) -> Tensor:
    return x * factor - x  # the product is rounded, and the difference is ten times smaller


def multiplying(x: Tensor, factor: Tensor) -> Tensor:
    return x * factor * factor


@pytest.fixture
def x() -> Tensor:
    return torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


FACTOR = torch.full((256,), 1.1).to(torch.bfloat16)


def compiled(op: dc.IrOp, x: Tensor, **options: bool) -> Tensor:
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(options=options))
    with mode:
        result: Tensor = op(x, FACTOR)
    assert mode.cache.stats().hits == 1
    return result


# torch 2.11 and 2.12 ignore the option on a CPU.
rounds_on_cpu = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="this torch's C++ code never rounds intermediate results"
)


@rounds_on_cpu
def test_a_difference_of_rounded_values_is_as_in_eager(define_ir_op, x):
    op = define_ir_op(cancelling)
    assert torch.equal(compiled(op, x), op(x, FACTOR))
    assert not torch.equal(compiled(op, x, emulate_precision_casts=False), op(x, FACTOR))


def test_a_product_of_rounded_values_is_off_by_the_last_place_at_most(define_ir_op, x):
    op = define_ir_op(multiplying)
    torch.testing.assert_close(compiled(op, x), op(x, FACTOR), rtol=2**-7, atol=0.0)


@rounds_on_cpu
def test_the_option_overrides(define_ir_op, x):
    op = define_ir_op(multiplying)
    assert torch.equal(compiled(op, x, emulate_precision_casts=True), op(x, FACTOR))
