"""Results are laid out as eager lays them out, also where strides address nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_same, specializations
from torch import Tensor

import dispatch_compile as dc

pytestmark = [pytest.mark.long, pytest.mark.run_once]

TOKENS = (7, 2, 30, 3, 1, 0)


def careless(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., list[Tensor]]:
    """A backend that keeps the strides that address something, and no other."""

    def run(*args: Any) -> list[Tensor]:
        return [_with_other_strides(result) for result in graph(*args)]

    return run


def _with_other_strides(tensor: Tensor) -> Tensor:
    empty = 0 in tensor.shape
    strides = [99 if size == 1 or empty else step for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(tensor.shape, strides)


CARELESS = dc.CompileConfig(backend=careless, on_failure="raise")


def numbers(*size: int) -> Tensor:
    return torch.arange(1.0, 1 + torch.Size(size).numel()).reshape(size)


INPUTS = {
    "rows": lambda n: numbers(n, 8),
    "columns": lambda n: numbers(8, n).t(),
    "of a wider one": lambda n: numbers(n, 24)[:, 8:16],
    "one column": lambda n: numbers(n, 1),
    "one of several columns": lambda n: numbers(n, 10)[:, 3:4],
    "one in the middle": lambda n: numbers(n, 5, 10)[:, 2:3, ::2],
    "one in the middle, transposed": lambda n: numbers(n, 10, 5).mT[:, :1],
    "one column, broadcast": lambda n: numbers(n, 1).expand(n, 8),
    "one row, broadcast": lambda n: numbers(8).expand(n, 8),
    "no columns": lambda n: torch.zeros(n, 1, 0),
    "permuted": lambda n: numbers(4, n, 3).permute(1, 0, 2),
}
BODIES = {
    "elementwise": lambda x: x * 2,
    "transposed": lambda x: x.mT * 2,
    "unsqueezed": lambda x: (x + 1).unsqueeze(1),
    "transposed, unsqueezed": lambda x: (x.transpose(0, -1) + 1)[:, None],
    "rows summed": lambda x: x.sum(-1, keepdim=True),
    "tokens summed": lambda x: x.sum(0, keepdim=True),
    "first column": lambda x: (x + 1)[..., :1],
    "half of the tokens": lambda x: x[: x.shape[0] // 2] * 2,
    "all tokens but one": lambda x: x[1:] * 2,
    "nothing of each token": lambda x: x[:, :0] + 1,
    "no row of columns": lambda x: x.transpose(0, -1)[:0] + 1,
    "of the same layout": lambda x: torch.zeros_like(x),
    "beside itself": lambda x: torch.stack([x, x], 1),
}


@pytest.mark.parametrize(("body", "given"), list(itertools.product(BODIES, INPUTS)))
def test_strides_are_eagers(body, given, define_ir_op):
    def native(x: Tensor) -> Tensor:
        return BODIES[body](x)

    op, mode = define_ir_op(native), dc.DispatchCompileMode(config=CARELESS)
    for tokens in TOKENS:
        x = INPUTS[given](tokens)
        expected = op(x)
        with mode:
            assert_same(op(x), expected)
    assert mode.cache.stats().hits == len(TOKENS)


@pytest.mark.parametrize("tokens", [(7, 2, 1), (1, 2, 7)])
@pytest.mark.parametrize(
    ("body", "given"),
    [
        ("transposed, unsqueezed", "rows"),
        ("transposed", "one column"),
        ("rows summed", "rows"),
        ("elementwise", "one in the middle"),
        ("nothing of each token", "columns"),
    ],
)
def test_strides_are_eagers_with_inductor(body, given, tokens, define_ir_op):
    def native(x: Tensor) -> Tensor:
        return BODIES[body](x)

    op, mode = define_ir_op(native), dc.DispatchCompileMode()
    for count in tokens:
        x = INPUTS[given](count)
        expected = op(x)
        with mode:
            for _ in range(2):
                assert_same(op(x), expected)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (2, 6)


def test_several_results_each_get_their_own(define_ir_op):
    def several(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x + 1, x.mT[:1] * 2, x.sum()

    op, mode = define_ir_op(several), dc.DispatchCompileMode(config=CARELESS)
    for tokens in TOKENS:
        x = numbers(8, tokens).t()
        expected = op(x)
        with mode:
            assert_same(op(x), expected)
    assert mode.cache.stats().hits == len(TOKENS)


@pytest.mark.parametrize("name", ["rms_norm", "silu_and_mul", "quant_fp8_per_token"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_nothing_is_corrected_where_nothing_differs(name, tokens):
    op, mode = getattr(dc.ops, name), dc.DispatchCompileMode()
    arguments = (None, 1e-6) if name == "rms_norm" else ()
    with mode:
        op(torch.randn(tokens, 16), *arguments)
    [specialization] = specializations(mode, op)
    assert "restrided" not in specialization.code.call


def test_results_are_no_views(define_ir_op):
    def column(x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True)

    op, x = define_ir_op(column), torch.randn(4, 3)
    with dc.DispatchCompileMode(config=CARELESS):
        for inference in (False, True):
            with torch.inference_mode(inference):
                y = op(x)
            assert (y.is_inference(), y._is_view()) == (inference, False)


def wrong(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., list[Tensor]]:
    """A backend that transposes: what it gives has elements elsewhere."""
    return lambda *args: [result.mT.contiguous().mT for result in graph(*args)]


def test_strides_that_address_something_are_not_corrected(define_ir_op):
    def double(x: Tensor) -> Tensor:
        return x * 2

    op, x = define_ir_op(double), torch.randn(1, 3, 4)
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend=wrong))
    with mode, pytest.warns(dc.DispatchCompileWarning, match=r"should have the strides \[12, 4, 1\]"):
        assert_same(op(x), x * 2)
    op_of_many, x = define_ir_op(double), torch.randn(5, 3, 4)
    with mode, pytest.warns(dc.DispatchCompileWarning, match="the code gives .* where eager gives"):
        assert_same(op_of_many(x), x * 2)


# ---- Ops of which torch's meta kernels, or Inductor, promise something else than eager gives


@pytest.mark.parametrize("reduce", [torch.any, torch.all])
def test_any_and_all(reduce, define_ir_op):
    """Of several dtypes, in one graph."""

    def counted(xs: list[Tensor]) -> list[Tensor]:
        results = []
        for x in xs:
            in_rows = reduce(x, -1)
            results += [reduce(x) + reduce(x), in_rows, in_rows + reduce(x, (0, 1), keepdim=True) * 3]
        return results

    op, mode = define_ir_op(counted), dc.DispatchCompileMode()
    for x in (torch.tensor([[1, 0], [1, 1], [0, 0]]), torch.ones(5, 2), torch.zeros(1, 2)):
        xs = [x.to(dtype) for dtype in (torch.uint8, torch.bool, torch.int32, torch.float32)]
        expected = op(xs)
        with mode:
            assert_same(op(xs), expected)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (2, 3)


def test_a_kernel_that_gives_other_strides_than_its_meta_kernel(define_ir_op):
    def log_sigmoid(x: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(x)

    op, mode, x = define_ir_op(log_sigmoid), dc.DispatchCompileMode(), torch.randn(8, 4).t()
    expected = op(x)
    promise = r"aten.log_sigmoid_forward.default gives .*\[8, 1\] .* where torch's meta kernel for it promises .*\[1, s"
    with mode, pytest.warns(dc.DispatchCompileWarning, match=promise):
        assert_same(op(x), expected)


def test_constants_that_make_a_nan(define_ir_op):
    """Inductor cannot compile what it would make of the layer norm, which is ATen's kernel instead."""

    def normalized(x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(torch.zeros(2, 1).log2(), (1,)) + x

    op, mode, x = define_ir_op(normalized), dc.DispatchCompileMode(), torch.randn(2, 1)
    expected = op(x)
    with mode:
        assert_same(op(x), expected)
    assert expected.isnan().all()
    assert mode.cache.stats().hits == 1
    [specialization] = specializations(mode, op)
    assert "aten.native_layer_norm.default(" in specialization.code.source
