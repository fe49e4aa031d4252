"""Arguments and thread states for which compiled code would be wrong: the call goes on as if there were no mode."""

from __future__ import annotations

import pytest
import torch
from support import EAGER, assert_same
from torch import Tensor, nn
from torch.autograd import forward_ad

import dispatch_compile as dc


@pytest.fixture
def mode():
    return dc.DispatchCompileMode(config=EAGER, trace=True)


def reason(mode: dc.DispatchCompileMode) -> str | None:
    assert mode.cache.stats().hits == 0
    assert mode.cache.stats().asides == len(mode.trace.events) > 0
    assert {event.action for event in mode.trace.events} == {"aside"}
    return mode.trace.events[-1].reason


# ---- Autograd


def gradients(run, *inputs: Tensor) -> list[Tensor]:
    for tensor in inputs:
        tensor.grad = None
    run().square().sum().backward()
    return [tensor.grad.clone() for tensor in inputs]


@pytest.mark.selective
def test_gradients_equal_eager(mode):
    x, weight = torch.randn(4, 8, requires_grad=True), nn.Parameter(torch.randn(8))

    def run() -> Tensor:
        return dc.ops.rms_norm(x, weight, 1e-6)

    expected = gradients(run, x, weight)
    with mode:
        assert_same(gradients(run, x, weight), expected)
    assert reason(mode) == "x requires grad and grad mode is on"


@pytest.mark.selective
def test_gradients_inside_an_opaque_op(mode, counted, define_opaque):
    def body(x: Tensor) -> Tensor:
        return counted(x) * 2

    op, x = define_opaque(body), torch.randn(4, 3, requires_grad=True)
    expected = gradients(lambda: op(x), x)
    with mode:
        assert_same(gradients(lambda: op(x), x), expected)
    assert reason(mode) == "x requires grad and grad mode is on"


def test_only_a_weight_requires_grad(mode):
    x, weight = torch.randn(4, 8), nn.Parameter(torch.randn(8))
    with mode:
        result = dc.ops.rms_norm(x, weight, 1e-6)
    assert result.requires_grad
    assert reason(mode) == "weight requires grad and grad mode is on"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_requires_grad_does_not_matter_without_grad_mode(context, mode, counted):
    x = torch.randn(4, 3, requires_grad=True)
    with context():
        expected = counted(x)
        with mode:
            assert_same(counted(x), expected)
    assert mode.cache.stats().hits == 1


def test_grad_mode_is_asked_at_every_call(mode, counted):
    x = torch.randn(4, 3, requires_grad=True)
    with mode:
        for _ in range(2):
            with torch.no_grad():
                assert not counted(x).requires_grad
            assert counted(x).requires_grad
    assert (mode.cache.stats().hits, mode.cache.stats().asides) == (2, 2)


def test_inference_tensors_outside_inference_mode(mode, counted):
    with torch.inference_mode():
        x = torch.randn(4, 3)
    expected = counted(x)
    with mode:
        assert_same(counted(x), expected)
    assert mode.cache.stats().hits == 1


def test_parameters_and_tensors_agree(mode, counted):
    x = torch.randn(4, 3)
    with torch.no_grad(), mode:
        for tensor in (x, nn.Parameter(x, requires_grad=False), x) * 2:
            assert_same(counted(tensor), x * 2 + 1)
        assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 6)
        for _ in range(2):  # an implementation can see that an argument requires grad
            assert_same(counted(nn.Parameter(x)), x * 2 + 1)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (2, 8)


@pytest.mark.selective
def test_forward_mode(mode, counted):
    primal, tangent = torch.randn(4, 3), torch.randn(4, 3)

    def derivative() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(counted(forward_ad.make_dual(primal, tangent))).tangent

    expected = derivative()
    with mode:
        counted(primal)
        assert_same(derivative(), expected)
    assert mode.trace.events[-1].reason == "forward-mode AD is active"


# ---- Thread state


@pytest.mark.selective
@pytest.mark.parametrize("inside", [True, False], ids=["autocast inside", "autocast outside"])
def test_autocast(inside, mode, define_ir_op):
    def project(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight

    op, x, weight = define_ir_op(project), torch.randn(4, 3), torch.randn(3, 5)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with autocast:
        expected = op(x, weight)
    with mode:
        plain = op(x, weight)  # what is compiled without autocast must not serve the call with it
        with autocast:
            assert_same(op(x, weight), expected)
        assert_same(op(x, weight), plain)
    assert plain.dtype == torch.float32


def test_default_dtype(mode, define_ir_op):
    def ones(x: Tensor) -> Tensor:
        return torch.ones(2) + torch.tensor(0.5)

    op, x = define_ir_op(ones), torch.randn(4, 3)
    for dtype in (torch.float32, torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            expected = op(x)
            with mode:
                assert_same(op(x), expected)
        finally:
            torch.set_default_dtype(torch.float32)


# ---- Tensors that are not plain


class Tagged(Tensor):
    """Overrides nothing, but its results are Tagged too."""


class Logged(Tensor):
    """Overrides ``__torch_function__``."""

    seen: list[str] = []  # noqa: RUF012 - the test reads and clears it

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


class Wrapper(Tensor):
    """Overrides ``__torch_dispatch__``: a tensor around a tensor."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inner = [arg.inner if isinstance(arg, Wrapper) else arg for arg in args]
        return cls(func(*inner, **(kwargs or {})))


def test_subclass_that_overrides_nothing(mode, counted):
    x = torch.randn(4, 3).as_subclass(Tagged)
    expected = counted(x)
    with mode:
        result = counted(x)
    assert type(result) is type(expected) is Tagged
    assert_same(result.as_subclass(Tensor), expected.as_subclass(Tensor))
    assert reason(mode) == "x is a Tagged"


def test_subclass_with_torch_function(mode, counted):
    x = torch.randn(4, 3).as_subclass(Logged)
    Logged.seen.clear()
    expected = counted(x)
    seen = Logged.seen.copy()
    Logged.seen.clear()
    with mode:
        result = counted(x)
    assert Logged.seen == seen != []
    assert_same(result, expected)


def test_subclass_with_torch_dispatch(mode, counted):
    x = torch.randn(4, 3)
    with mode:
        result = counted(Wrapper(x))
    assert type(result) is Wrapper
    assert_same(result.inner, counted(x))
    assert mode.cache.stats().hits == 1, "the call on the inner tensor is a plain one"


NOT_PLAIN = {
    "sparse": (lambda: torch.eye(4).to_sparse(), "x is sparse_coo"),
    "sparse rows": (lambda: torch.eye(4).to_sparse_csr(), "x is sparse_csr"),
    "meta": (lambda: torch.empty(4, 3, device="meta"), "x is on the meta device"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.randn(4, 3), 0.1, 0, torch.qint8), "x is quantized"),
}


@pytest.mark.parametrize("kind", list(NOT_PLAIN))
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*quantize")
def test_not_plain(kind, mode, define_ir_op):
    def double(x: Tensor) -> Tensor:
        return x.dequantize() * 2 if x.is_quantized else x * 2

    make, why = NOT_PLAIN[kind]
    op, x = define_ir_op(double), make()
    expected = op(x)
    with mode:
        result = op(x)
    assert (result.layout, result.is_meta, result.dtype) == (expected.layout, expected.is_meta, expected.dtype)
    if expected.layout is not torch.strided:
        assert_same(result.to_dense(), expected.to_dense())
    assert reason(mode) == why


def test_lazy_conjugates_and_negatives(mode, counted):
    x = torch.randn(4, 3, dtype=torch.complex64)
    for lazy in (x, x.conj(), x.conj().imag, x.imag, x):
        expected = counted(lazy)
        with mode:
            assert_same(counted(lazy), expected)


def test_the_same_tensor_twice(mode, define_ir_op):
    def combine(x: Tensor, x_other: Tensor) -> Tensor:
        return x * 2 if x is x_other else x * x_other

    op, x, y = define_ir_op(combine), torch.randn(4, 3), torch.randn(4, 3)
    for first, second in ((x, x), (x, y), (x, x), (x, x.clone()), (y, x), (x, x)):
        expected = op(first, second)
        with mode:
            assert_same(op(first, second), expected)
    assert (mode.cache.stats().hits, mode.cache.stats().asides) == (3, 3)
    assert mode.trace.events[0].reason == "x_other is the same tensor as x"


def test_the_same_tensor_twice_in_a_list(mode, define_ir_op):
    def total(xs: list[Tensor]) -> Tensor:
        return torch.stack(xs).sum(0)

    op, x = define_ir_op(total), torch.randn(4, 3)
    expected = op([x, x])
    with mode:
        assert_same(op([x, x]), expected)
        assert_same(op([x, x.clone()]), expected)
        assert_same(op([x, x]), expected)


def test_views_of_one_storage(mode, define_ir_op):
    def add(x: Tensor, x_other: Tensor) -> Tensor:
        return x + x_other

    op, base = define_ir_op(add), torch.randn(8, 3)
    with mode:
        assert_same(op(base[:5], base[3:]), base[:5] + base[3:])
        assert_same(op(base[:5], base[:5]), base[:5] * 2)
    assert mode.cache.stats().hits == 2


# ---- Errors of a call come out as they are


@pytest.mark.parametrize("arguments", [(), (1,), ("x", 2.0), (torch.ones(2), "two")], ids=str)
def test_malformed_calls_raise_as_without_the_mode(arguments, mode, counted):
    with pytest.raises((TypeError, RuntimeError)) as expected:
        counted(*arguments)
    with mode, pytest.raises(type(expected.value)) as actual:
        counted(*arguments)
    assert str(actual.value) == str(expected.value)
