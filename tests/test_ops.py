"""The ops that ship with the package, against references of their formulas in float64, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from support import assert_same
from torch import Tensor

from dispatch_compile import ops

FP8 = torch.float8_e4m3fn
WIDE = [torch.float32, torch.float64, torch.bfloat16]


def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(math.prod(size))).to(dtype)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def rows(x: Tensor) -> list[list[float]]:
    return x.double().reshape(-1, x.shape[-1]).tolist()


def rms_norm_reference(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    factors = [1.0] * x.shape[-1] if weight is None else weight.double().tolist()
    out = []
    for row in rows(x):
        root = math.sqrt(sum(value * value for value in row) / len(row) + epsilon)
        out.append([value / root * factor for value, factor in zip(row, factors, strict=True)])
    return torch.tensor(out, dtype=torch.float64).reshape(x.shape)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("shape", [(5, 8), (1, 8), (3, 2, 8)], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(shape, dtype, weighted):
    x, weight = random(*shape, dtype=dtype), random(8, dtype=dtype) if weighted else None
    close(ops.rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), dtype)


def test_rms_norm_of_zeros():
    assert_same(ops.rms_norm(torch.zeros(2, 8), None, 1e-6), torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_fused_add_rms_norm(dtype, weighted):
    x, residual = random(5, 8, dtype=dtype), random(5, 8, dtype=dtype) * 3 + 1
    weight = random(8, dtype=dtype) if weighted else None
    y, total = ops.fused_add_rms_norm(x, residual, weight, 1e-6)
    close(total, x.double() + residual.double(), dtype)
    close(y, rms_norm_reference(x.double() + residual.double(), weight, 1e-6), dtype)


def test_fused_add_rms_norm_leaves_its_arguments():
    x, residual = random(5, 8), random(5, 8)
    given = (x.clone(), residual.clone())
    ops.fused_add_rms_norm(x, residual, None, 1e-6)
    assert_same((x, residual), given)


def silu(a: float) -> float:
    return a / (1 + math.exp(-a))


def gelu(a: float) -> float:
    return a * 0.5 * (1 + math.erf(a / math.sqrt(2)))


def gelu_tanh(a: float) -> float:
    return a * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))


def gated_reference(x: Tensor, activation) -> Tensor:
    half = x.shape[-1] // 2
    out = [[activation(gate) * up for gate, up in zip(row[:half], row[half:], strict=True)] for row in rows(x)]
    return torch.tensor(out, dtype=torch.float64).reshape(*x.shape[:-1], half)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("shape", [(5, 8), (3, 2, 8)], ids=str)
@pytest.mark.parametrize(
    ("op", "options", "activation"),
    [
        (ops.silu_and_mul, (), silu),
        (ops.gelu_and_mul, (), gelu),
        (ops.gelu_and_mul, ("none",), gelu),
        (ops.gelu_and_mul, ("tanh",), gelu_tanh),
    ],
    ids=["silu", "gelu by default", "gelu", "gelu tanh"],
)
def test_gated(op, options, activation, shape, dtype):
    x = random(*shape, dtype=dtype) * 3
    close(op(x, *options), gated_reference(x, activation), dtype)


# ---- float8


def steps_apart(q: Tensor, exact: Tensor) -> float:
    """How far float8 values are from the exact ones, in units of the spacing of float8 numbers there."""
    q, exact = q.double(), exact.clamp(-448.0, 448.0)
    exponent = torch.floor(torch.log2(exact.abs().clamp(min=2.0**-6)))
    return ((q - exact).abs() / 2.0 ** (exponent - 3)).max().item()


NEAREST = 0.5 + 1e-3  # half a step, and what float32 adds to it


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.02, 7.5])
def test_quant_fp8_static(scale, dtype):
    x = random(6, 16, dtype=dtype) * 30
    q = ops.quant_fp8_static(x, torch.tensor([scale]))
    assert (q.dtype, q.shape) == (FP8, x.shape)
    assert steps_apart(q, x.double() / torch.tensor(scale).double()) <= NEAREST


def test_static_scale_saturates_at_448():
    x = torch.tensor([[1e9, -1e9, 449.0, -448.0, float("inf"), float("-inf")]])
    q = ops.quant_fp8_static(x, torch.tensor(1.0))
    assert q.float().tolist() == [[448.0, -448.0, 448.0, -448.0, 448.0, -448.0]]


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16)], ids=str)
def test_quant_fp8_per_token(shape, dtype):
    x = random(*shape, dtype=dtype) * 30
    q, scale = ops.quant_fp8_per_token(x)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (FP8, x.shape, torch.float32, (*shape[:-1], 1))
    largest = torch.tensor([max(map(abs, row)) for row in rows(x)], dtype=torch.float64).reshape(scale.shape)
    torch.testing.assert_close(scale.double(), largest / 448, rtol=1e-6, atol=0.0)
    assert steps_apart(q, x.double() / scale.double()) <= NEAREST
    assert (q.float().abs().amax(-1) == 448).all(), "the largest of each row uses the whole range"


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_quant_fp8_per_group(dtype):
    x = random(3, 384, dtype=dtype) * torch.tensor([1.0, 100.0, 0.01]).repeat_interleave(128).to(dtype)
    q, scale = ops.quant_fp8_per_group(x)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (FP8, x.shape, torch.float32, (3, 3))
    for row in range(3):
        for group in range(3):
            part = slice(group * 128, (group + 1) * 128)
            one_q, one_scale = ops.quant_fp8_per_token(x[row : row + 1, part])
            assert_same(q[row, part].float(), one_q[0].float())
            assert_same(scale[row, group], one_scale[0, 0])


@pytest.mark.parametrize("width", [1, 100, 130])
def test_group_must_divide_the_width(width):
    with pytest.raises(ValueError, match=rf"divisible by 128, but x is \(2, {width}\)"):
        ops.quant_fp8_per_group(torch.zeros(2, width))


@pytest.mark.parametrize("op", [ops.quant_fp8_per_token, ops.quant_fp8_per_group])
def test_rows_of_zeros(op):
    x = torch.zeros(3, 128)
    x[1] = 5.0
    q, scale = op(x)
    assert q.float()[[0, 2]].eq(0).all()
    assert q.float()[1].eq(448).all()
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("op", [ops.quant_fp8_per_token, ops.quant_fp8_per_group])
def test_huge_and_tiny_rows(op):
    x = torch.tensor([[1e30], [-1e30], [1e-30]]).expand(3, 128).clone()
    x[:, 0] = 0
    q, scale = op(x)
    assert q.float()[0, 1:].eq(448).all()
    assert q.float()[1, 1:].eq(-448).all()
    assert q.float()[:, 0].eq(0).all()
    assert scale.min() >= 1 / (448 * 512)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_concat_quant_fp8(dtype):
    latent, rope, scale = random(3, 2, 8, dtype=dtype), random(3, 2, 4, dtype=dtype) * 9, torch.tensor([0.05])
    q = ops.concat_quant_fp8(latent, rope, scale)
    assert (q.dtype, q.shape) == (FP8, (3, 2, 12))
    assert_same(q[..., :8].float(), ops.quant_fp8_static(latent, scale).float())
    assert_same(q[..., 8:].float(), ops.quant_fp8_static(rope, scale).float())
    exact = latent.double() / scale.double()
    assert steps_apart(q[..., :8], exact) <= NEAREST


# ---- Autograd, shapes


@pytest.mark.parametrize(
    "run",
    [
        lambda x, w: ops.rms_norm(x, w, 1e-3),
        lambda x, w: ops.fused_add_rms_norm(x, x.sin(), w, 1e-3),
        lambda x, w: ops.silu_and_mul(x) * w[:4],
        lambda x, w: ops.gelu_and_mul(x) * w[:4],
    ],
    ids=["rms_norm", "fused_add_rms_norm", "silu_and_mul", "gelu_and_mul"],
)
def test_gradients(run):
    x, weight = random(3, 8, dtype=torch.float64).requires_grad_(), random(8, dtype=torch.float64).requires_grad_()
    # The norms compute in float32, so finite differences need a wide step.
    assert torch.autograd.gradcheck(run, (x, weight), eps=1e-2, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tokens_and_one(tokens):
    x, scale = random(tokens, 128), torch.tensor([0.1])
    assert ops.rms_norm(x, None, 1e-6).shape == (tokens, 128)
    assert ops.silu_and_mul(x).shape == (tokens, 64)
    assert ops.quant_fp8_static(x, scale).shape == (tokens, 128)
    assert [part.shape[0] for part in ops.quant_fp8_per_token(x)] == [tokens] * 2
    assert [part.shape[0] for part in ops.quant_fp8_per_group(x)] == [tokens] * 2
    assert ops.concat_quant_fp8(x, x, scale).shape == (tokens, 256)


def test_every_op_has_a_documented_formula_and_shapes():
    for name in ops.__all__:
        doc = getattr(ops, name).__doc__
        assert "``[T" in doc, name
        assert "Args:" in doc, name
        assert "Returns:" in doc, name
