"""``CompileConfig(bitwise=True)``: compiled results have the bits of the eager ones; a NaN is as good as any other.

docs/numerics.md says so. Whatever cannot be equal would stand there with its distance, and here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody gives it
from support import specializations
from torch import Tensor
from torch._dynamo.utils import counters

import dispatch_compile as dc
from benchmarks import numerics_results
from benchmarks.cases import CASES, Case, Inputs, RoughInputs, Sizes, tensors
from benchmarks.ulps import Distance
from dispatch_compile._compile import compilation as _compilation
from dispatch_compile._numerics.bitwise import ACCURATE_RECIPROCAL, ROUNDS_IN_CPP

pytestmark = [pytest.mark.long, pytest.mark.run_once]

BITWISE = dc.CompileConfig(bitwise=True)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
BF16, FP16, FP32 = DTYPES = torch.bfloat16, torch.float16, torch.float32
FP8 = torch.float8_e4m3fn, torch.float8_e5m2
MANY = (3, 7, 64, 1025)
EQUAL = (0, 0)
FIGURES = Path(__file__).parents[2] / "benchmarks" / "figures"


def differences(mode: dc.DispatchCompileMode, op: Any, *args: Any) -> list[tuple[int, float]]:
    """For each result: how many elements of it differ, and by how many ULPs at most. Compiled code must run."""
    expected, hits = tensors(op(*args)), mode.cache.stats().hits
    with mode:
        actual = tensors(op(*args))
    assert mode.cache.stats().hits == hits + 1
    distances = [Distance.between([one], [other]) for one, other in zip(actual, expected, strict=True)]
    return [(distance.different, distance.ulps) for distance in distances]


def case_differs(
    mode: dc.DispatchCompileMode, case: Case, tokens: int, hidden: int, dtype: torch.dtype, device: str
) -> bool:
    """Whether any result of a case does, for inputs of unit size and for rough ones."""
    sizes = Sizes(tokens, hidden, dtype, device)
    found = [differences(mode, case.op, *case.arguments(inputs(sizes))) for inputs in (Inputs, RoughInputs)]
    return any(difference != EQUAL for result in found for difference in result)


# ---- The ops that ship. Each compilation takes seconds on a CPU: one dtype or two for each op, odd sizes for some.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "dtype", "hidden", "token_counts"),
    [
        ("rms_norm", BF16, 1024, MANY),
        ("rms_norm", FP32, 1003, (1,)),
        ("fused_add_rms_norm", FP16, 1003, MANY),
        ("silu_and_mul", BF16, 1024, (1,)),
        ("silu_and_mul", FP32, 2054, MANY),
        ("gelu_and_mul", FP16, 74, MANY),
        ("quant_fp8_static", FP32, 1003, MANY),
        ("quant_fp8_per_token", BF16, 1003, MANY),
        ("quant_fp8_per_token", FP16, 1024, (1,)),
        ("quant_fp8_per_group", BF16, 1024, MANY),
        ("concat_quant_fp8", BF16, 1024, MANY),
        ("silu_and_mul_quant_fp8_per_token", BF16, 1024, MANY),
        ("silu_and_mul_quant_fp8_per_group", FP16, 1024, MANY),
        ("rms_norm_quant_fp8_per_token", FP16, 1003, (1,)),
        ("rms_norm_quant_fp8_per_group", BF16, 1024, MANY),
        ("fused_add_rms_norm_quant_fp8_per_token", FP32, 1003, MANY),
        ("fused_add_rms_norm_quant_fp8_per_group", BF16, 1024, MANY),
    ],
)
def test_shipped_ops_have_the_bits_of_eager(name, dtype, hidden, token_counts, device):
    mode = dc.DispatchCompileMode(config=BITWISE)
    unequal = [n for n in token_counts if case_differs(mode, CASES[name], n, hidden, dtype, device)]
    assert not unequal
    assert mode.cache.stats().compiles == 1


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_shipped_ops_in_every_dtype(name, dtype):
    mode = dc.DispatchCompileMode(config=BITWISE)
    assert not [n for n in (1, *MANY) if case_differs(mode, CASES[name], n, 2048, dtype, "cuda")]
    assert mode.cache.stats().compiles == 2


@pytest.mark.parametrize("device", DEVICES)
def test_another_overload_and_another_function(device):
    """With the code of the cases above, for the most part."""
    mode = dc.DispatchCompileMode(config=BITWISE)
    make = Inputs(Sizes(7, 1003, FP16, device))
    x, residual, weight, epsilon = CASES["fused_add_rms_norm"].arguments(make)
    expected = dc.ops.fused_add_rms_norm(x, residual, weight, epsilon)
    with mode:
        actual = dc.ops.fused_add_rms_norm.maybe_inplace(x.clone(), residual.clone(), weight, epsilon)
    assert mode.cache.stats().hits == 1
    assert Distance.between(actual, expected).different == 0
    assert differences(mode, dc.ops.gelu_and_mul, make.normal(7, 74), "tanh") == [EQUAL]


def test_the_default_differs():
    """Or the tests above could not tell."""
    assert case_differs(dc.DispatchCompileMode(), CASES["rms_norm"], 1025, 1024, BF16, "cpu")


# ---- Ops of users: what Inductor computes otherwise than ATen, and what looks as if it changed nothing


ZOO: dict[str, Callable[..., list[Tensor]]] = {
    "functions": lambda x, w, m: [f(x) for f in (torch.exp, torch.tanh, torch.sigmoid, torch.erf, torch.sin)],
    "activations": lambda x, w, m: [F.relu(x), F.gelu(x), F.silu(x), F.softplus(x), F.leaky_relu(x)],
    "powers": lambda x, w, m: [x**2, x**3, x.abs() ** 0.5, x.abs().sqrt(), x.abs().rsqrt(), x.reciprocal(), 2**x],
    "sums": lambda x, w, m: [x.sum(-1), x.mean(-1), x.var(-1), x.cumsum(-1), x.float().norm(dim=-1)],
    "normalizations": lambda x, w, m: [x.softmax(-1), F.layer_norm(x, w.shape, w), F.rms_norm(x, w.shape, w)],
    "extremes": lambda x, w, m: [
        x.amax(-1),
        x.abs().amax(-1),
        x.argmax(-1),
        x.max(w),
        x.clamp(min=0),
        x.clamp(max=w * 0),
    ],
    "matrices": lambda x, w, m: [x @ m, F.linear(x, m.t(), w[:32])],
    "numbers that 16 bits do not hold": lambda x, w, m: [x * 1.1, x + 1e-3, x / 3, x - 0.3, x.clamp(-0.1, 0.1)],
    "numbers that they do": lambda x, w, m: [x * 2, x + 0.5, x / 4, 1 - x, x * x.size(0)],
    "fused multiply-add": lambda x, w, m: [x * w + x, torch.addcmul(x, x, w), torch.add(x, w, alpha=3), x.lerp(w, 0.3)],
    "rounding that shows": lambda x, w, m: [x * w - x, (x * w).float() * 3, x.to(BF16).float(), (x + w) * w - x],
    "nothing": lambda x, w, m: [x + 0.0, x * 1, x - torch.zeros_like(x), -x, x.float().to(x.dtype).double()],
    "choices": lambda x, w, m: [torch.where(x > 0.5, x, w), x.masked_fill(x < w, 3.0), x.sign(), x.round()],
    "layouts": lambda x, w, m: [(x.t() * 2).sum(0), x.flip(-1) * w, torch.cat([x, x * w], -1), x[:, ::2] * 2],
    "conversions": lambda x, w, m: [x.double() * 3, x.to(FP8[0]), x.clamp(-9, 9).to(FP8[1])],
    "integers": lambda x, w, m: [x.argsort(stable=True).to(torch.int32) * 3 + 1, x.clamp(-9, 9).to(torch.int32)],
    "0-dim operands": lambda x, w, m: [x * w.float().sum().clamp(-9, 9), x + w[0].double(), x / w[1]],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "names"),
    [(BF16, list(ZOO)), (FP32, ["functions", "powers", "sums", "matrices", "fused multiply-add", "nothing"])],
    ids=["bf16", "fp32"],
)
def test_ops_of_users_have_the_bits_of_eager(dtype, names, device, define_ir_op):
    def zoo(x: Tensor, weight: Tensor, matrix: Tensor) -> list[Tensor]:
        return [result for name in names for result in ZOO[name](x, weight, matrix)]

    op, mode = define_ir_op(zoo), dc.DispatchCompileMode(config=BITWISE)
    for inputs in (Inputs, RoughInputs):
        for tokens in (7, 64):
            make = inputs(Sizes(tokens, 256, dtype, device))
            args = make.activation(), make.weight(), make.normal(256, 32)
            found = iter(differences(mode, op, *args))
            by_name = {name: [next(found) for _ in ZOO[name](*args)] for name in names}
            assert not {name: found for name, found in by_name.items() if set(found) != {EQUAL}}, (inputs, tokens)
    assert mode.cache.stats().compiles == 1


@pytest.mark.cuda
def test_what_a_gpu_does_not_compute_by_definition_is_equal_for_every_float32(define_ir_op):
    """Triton's code for these has other instructions than ATen's, or approximate ones."""

    def functions(x: Tensor) -> list[Tensor]:
        quantized = [x.clamp(-torch.finfo(fp8).max, torch.finfo(fp8).max).to(fp8) for fp8 in FP8]
        reciprocals = [x.rsqrt(), x / 3, *([x.reciprocal()] if ACCURATE_RECIPROCAL else [])]
        return [x.sqrt(), *reciprocals, x.to(BF16), x.to(FP16), *quantized]

    op, mode = define_ir_op(functions), dc.DispatchCompileMode(config=BITWISE)
    count = 2**26
    for start in range(-(2**31), 2**31, count):
        bits = torch.arange(start, start + count, device="cuda").to(torch.int32)
        assert set(differences(mode, op, bits.view(FP32))) == {EQUAL}
    without_comments = re.sub(r"#.*", "", specializations(mode, op)[0].code.source)
    assert "torch.ops.aten." not in without_comments


ORDERS = {
    "last two dimensions swapped": lambda x: x.mT,
    "tokens last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "in reverse": lambda x: x.permute(2, 1, 0),
    "part of the rows": lambda x: x[:, :16],
}


@pytest.mark.parametrize("order", ORDERS)
def test_atens_kernels_get_the_strides_that_eagers_get(order, define_ir_op):
    """They sum in the order of the strides; Inductor would choose its operands' for a copy that is to be contiguous."""

    def copied(x: Tensor) -> list[Tensor]:
        contiguous = x.contiguous()
        return [
            (x + 1).reshape(-1),
            (x * 2).flatten(1).exp(),
            (x + 1).contiguous().sum(-1),
            (x * 2).clone(memory_format=torch.contiguous_format).mean((0, 2)),
            (contiguous * x).sum(-1),
            torch.where(contiguous > 0, x, contiguous).sum(1),
        ]

    op, mode = define_ir_op(copied), dc.DispatchCompileMode(config=BITWISE)
    x = ORDERS[order](torch.randn(64, 32, 48, generator=torch.Generator().manual_seed(0)))
    assert differences(mode, op, x) == [EQUAL] * 6


# ---- What is compiled and what is not


def code_of(op: dc.IrOp, *args: Any) -> str:
    mode = dc.DispatchCompileMode(config=BITWISE)
    with mode:
        op(*args)
    (specialization,) = specializations(mode, op)
    return str(specialization.code.source)


def test_aten_computes_what_it_alone_can_and_inductor_fuses_the_rest():
    x, weight = torch.randn(4, 1024, dtype=BF16), torch.randn(1024, dtype=BF16)
    code = code_of(dc.ops.rms_norm, x, weight, 1e-6)
    assert re.findall(r"= torch\.ops\.aten\.(\w+)", code) == CALLS_IN_RMS_NORM
    assert code.count("async_compile.cpp_pybinding(") == 2 if ROUNDS_IN_CPP else 3


# torch 2.11 and 2.12 cannot round within a kernel on a CPU, so it is ATen that rounds.
CALLS_IN_RMS_NORM = ["mean"] if ROUNDS_IN_CPP else ["_to_copy", "mean", "_to_copy"]


def test_a_quantization_is_one_kernel():
    code = code_of(dc.ops.quant_fp8_per_token, torch.randn(4, 1003, dtype=BF16))
    assert "torch.ops.aten." not in code
    assert code.count("async_compile.cpp_pybinding(") == 1


@pytest.mark.parametrize("bitwise", [True, False])
def test_inductors_cache_on_disk_takes_the_code(bitwise):
    bypassed = counters["inductor"]["fxgraph_cache_bypass"]
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(bitwise=bitwise))
    with mode:
        dc.ops.silu_and_mul(torch.randn(4, 2054))
    assert mode.cache.stats().compiles == 1
    assert counters["inductor"]["fxgraph_cache_bypass"] == bypassed


def test_options_of_the_user_come_on_top(monkeypatch):
    asked_for = {}

    def compiler(graph, inputs, options, decompositions):
        asked_for.update(options)
        raise RuntimeError("enough")

    monkeypatch.setattr(_compilation, "inductor_compile", compiler)
    config = dc.CompileConfig(bitwise=True, options={"pattern_matcher": True}, on_failure="raise")
    with dc.DispatchCompileMode(config=config), pytest.raises(dc.CompileError, match="enough"):
        dc.ops.silu_and_mul(torch.randn(4, 6))
    assert asked_for["pattern_matcher"] is True
    assert asked_for["fallback_by_default"] is True


# ---- The measure


@pytest.mark.parametrize("dtype", [*DTYPES, *FP8], ids=str)
def test_distance(dtype):
    def distance(one: float, other: float) -> tuple[int, float]:
        found = Distance.between([torch.tensor([one]).to(dtype)], [torch.tensor([other]).to(dtype)])
        assert found.elements == 1
        return found.different, found.ulps

    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert distance(1.0, 1.0) == (0, 0)
    assert distance(1.0, 1 + eps) == distance(-1.0, -1 - eps) == (1, 1)
    assert distance(1 + 3 * eps, 1.0) == (1, 3)
    assert distance(0.0, -0.0) == distance(-0.0, 0.0) == (1, 1)
    assert distance(tiny, -tiny) == (1, 3)
    assert distance(math.nan, -math.nan) == (0, 0)
    assert distance(math.nan, 1.0) == (1, math.inf)


def test_rough_inputs_are_rough():
    for dtype in DTYPES:
        x = RoughInputs(Sizes(64, 1024, dtype, "cpu")).activation()
        smallest = torch.finfo(dtype).smallest_normal
        assert x.isnan().any()
        assert x.isinf().any()
        assert ((x != 0) & (x.abs() < smallest)).any()
        assert {False, True} == set(x[x == 0].signbit().tolist())
        assert x[::4].abs().max() > 1000 * x[::4].abs().min()


# ---- What is documented


@pytest.mark.parametrize("path", sorted(FIGURES.glob("numerics_*.json")), ids=lambda path: path.stem)
def test_the_measured_results_are_equal_for_every_op_and_dtype(path):
    rows = numerics_results.read(path).rows
    assert {(row.op, row.dtype) for row in rows} == {(op, dtype) for op in CASES for dtype in ("bf16", "fp16", "fp32")}
    unequal = [row for row in rows if any(d.different for d in row.distances[numerics_results.BITWISE].values())]
    assert not unequal
