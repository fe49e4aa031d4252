"""Two calls that differ in one thing that is baked in never run each other's code."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from support import EAGER, assert_same
from torch import Tensor
from torch.types import Number

import dispatch_compile as dc


def plain() -> Tensor:
    return torch.arange(12.0).view(4, 3)


def inference_tensor() -> Tensor:
    with torch.inference_mode():
        return plain()


class default_dtype:  # noqa: N801 - used as torch's own contexts are
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.previous = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.previous)


class deterministic:  # noqa: N801
    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


class matmul_precision:  # noqa: N801
    def __init__(self, precision: str) -> None:
        self.precision = precision

    def __enter__(self) -> None:
        torch.set_float32_matmul_precision(self.precision)

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision("highest")


Call = tuple[Callable[[], Tensor], Any, Callable[[], AbstractContextManager[Any]]]


def call(make: Callable[[], Tensor] = plain, scalar: Any = 1.0, context: Any = nullcontext) -> Call:
    return make, scalar, context


DIFFERENT = {
    "1 and 1.0": (call(scalar=1), call(scalar=1.0)),
    "True and 1": (call(scalar=True), call(scalar=1)),
    "0.0 and -0.0": (call(scalar=0.0), call(scalar=-0.0)),
    "nan and 1.0": (call(scalar=float("nan")), call(scalar=1.0)),
    "inf and -inf": (call(scalar=float("inf")), call(scalar=float("-inf"))),
    "dtype": (call(), call(lambda: plain().double())),
    "rank": (call(), call(lambda: plain().unsqueeze(-1))),
    "size": (call(), call(lambda: plain()[:, :2].contiguous())),
    "one token": (call(), call(lambda: plain()[:1])),
    "no tokens": (call(), call(lambda: plain()[:0])),
    "row stride": (call(), call(lambda: torch.arange(24.0).view(4, 6)[:, :3])),
    "column-major": (call(), call(lambda: plain().t().contiguous().t())),
    "expanded": (call(), call(lambda: plain()[:1].expand(4, 3))),
    "requires_grad": (call(context=torch.no_grad), call(lambda: plain().requires_grad_(), context=torch.no_grad)),
    "inference tensor": (call(context=torch.no_grad), call(inference_tensor, context=torch.no_grad)),
    "inference mode": (call(context=torch.no_grad), call(context=torch.inference_mode)),
    "grad mode": (call(context=torch.no_grad), call()),
    "default dtype": (call(), call(context=lambda: default_dtype(torch.float64))),
    "deterministic": (call(), call(context=deterministic)),
    "matmul precision": (
        call(context=lambda: matmul_precision("highest")),
        call(context=lambda: matmul_precision("high")),
    ),
    "matmul precision high and medium": (
        call(context=lambda: matmul_precision("high")),
        call(context=lambda: matmul_precision("medium")),
    ),
}


def seen(x: Tensor) -> float:
    """A number that tells apart what the implementation can see."""
    return (
        1.0
        + 2 * x.requires_grad
        + 4 * x.is_inference()
        + 8 * torch.is_grad_enabled()
        + 16 * torch.is_inference_mode_enabled()
        + 32 * (torch.get_default_dtype() is torch.float64)
        + 64 * torch.are_deterministic_algorithms_enabled()
        + 128 * (torch.get_float32_matmul_precision() == "high")
        + 256 * x.is_contiguous()
    )


@pytest.mark.parametrize("order", ["as given", "reversed"])
@pytest.mark.parametrize("kind", DIFFERENT)
def test_calls_that_differ_in_one_thing(kind, order, define_ir_op):
    def telling(x: Tensor, scalar: Number) -> Tensor:
        return torch.where(x > 5, x * scalar, 1 / (x * scalar)) * seen(x)

    op, mode = define_ir_op(telling), dc.DispatchCompileMode(config=EAGER)
    pair = DIFFERENT[kind] if order == "as given" else DIFFERENT[kind][::-1]
    for make, scalar, context in pair * 2:
        x = make()
        with context():
            expected = op(x, scalar)
            with mode:
                actual = op(x, scalar)
        assert_same(actual, expected)
    assert mode.cache.stats().compiles == 2
    assert mode.cache.stats().hits == 4
