"""Natives, compositions and arithmetic on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dispatch_compile as dc

pytestmark = pytest.mark.cuda

COUNTS = (7, 1, 64, 3, 16384, 1000)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def mode():
    return dc.DispatchCompileMode(config=dc.CompileConfig(on_failure="raise"), trace=True)


def random(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*size, device="cuda").to(dtype)


def kernels(code: str | None) -> int:
    assert code is not None
    return code.count(".run(")


def test_one_kernel_for_any_parameter_names_and_few_compilations(mode):
    @dc.native
    def gated(q, g, limit=7.0):
        return torch.sigmoid(g.clamp(max=limit)) * q

    for count in COUNTS:
        q, g = random(count, 512), random(count, 512)
        with mode:
            actual = gated(q, g)
        torch.testing.assert_close(actual, gated(q, g), rtol=1.6e-2, atol=1e-3)
    assert mode.cache.stats().compiles <= 3
    assert [event.action for event in mode.trace.events] == ["compiled"] * len(COUNTS)
    assert kernels(mode.explain(gated, q, g).generated_code) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_keep_changing(mode, dtype):
    @dc.native
    def scaled(q, scale, times):
        return q * scale, q + scale, q - scale, q / scale, torch.where(q > scale, q, scale), q * times

    q = random(64, 512, dtype=dtype)
    for i, value in enumerate((0.2, 0.3, 0.4, 0.7, -1.5, 20.25)):
        with mode:
            actual = scaled(q, value, i + 2)
        for one, other in zip(actual, scaled(q, value, i + 2), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6 if dtype is torch.float32 else 0.0, atol=0.0)
    assert mode.cache.stats().compiles <= 3


def test_a_cache_that_is_written(mode):
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kept", torch.zeros(4096, 128, device="cuda", dtype=torch.bfloat16))

        @dc.native
        def put(self, rows, values, scale=0.5):
            self.kept.index_copy_(0, rows, values * scale)

    cache = Cache()
    for count in (3, 5, 4096):
        rows, values = torch.randperm(4096, device="cuda")[:count], random(count, 128)
        with mode:
            cache.put(rows, values)
        torch.testing.assert_close(cache.kept[rows], values * 0.5)
    assert [event.action for event in mode.trace.events] == ["compiled"] * 3


def test_columns_of_one_matrix_are_written(mode):
    @dc.native
    def rotated_(q, k):
        q.neg_()
        k.mul_(2)

    for count in (4, 5, 700):
        qkv = random(count, 384)
        expected = torch.cat([-qkv[:, :128], qkv[:, 128:256] * 2, qkv[:, 256:]], 1)
        with mode:
            rotated_(qkv[:, :128], qkv[:, 128:256])
        torch.testing.assert_close(qkv, expected, rtol=0.0, atol=0.0)
    assert [event.action for event in mode.trace.events] == ["compiled"] * 3


@pytest.mark.parametrize(
    ("fused", "parts"),
    [
        (dc.ops.silu_and_mul_quant_fp8_per_group, lambda x, w: dc.ops.quant_fp8_per_group(dc.ops.silu_and_mul(x))),
        (dc.ops.silu_and_mul_quant_fp8_per_token, lambda x, w: dc.ops.quant_fp8_per_token(dc.ops.silu_and_mul(x))),
        (dc.ops.rms_norm_quant_fp8_per_group, lambda x, w: dc.ops.quant_fp8_per_group(dc.ops.rms_norm(x, w, 1e-6))),
        (dc.ops.rms_norm_quant_fp8_per_token, lambda x, w: dc.ops.quant_fp8_per_token(dc.ops.rms_norm(x, w, 1e-6))),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@pytest.mark.parametrize("bitwise", [False, True])
def test_compositions_are_fused_and_round_where_their_parts_do(fused, parts, bitwise):
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(bitwise=bitwise, on_failure="raise"), trace=True)
    norm = fused.name.startswith("rms")
    weight = random(4096)
    for count in (8, 1, 600):
        x = random(count, 4096 if norm else 8192)
        args = (x, weight, 1e-6) if norm else (x,)
        expected = parts(x, weight)
        with mode:
            actual = fused(*args)
        for one, other in zip(actual, expected, strict=True):
            if bitwise:
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
            else:
                torch.testing.assert_close(one.float(), other.float(), rtol=0.126, atol=2e-3)
    assert all(event.action == "compiled" and event.fuses for event in mode.trace.events)
    if not bitwise:
        two_reductions = fused is dc.ops.rms_norm_quant_fp8_per_group  # a row's and a group's are not fused
        assert kernels(mode.explain(fused, *args).generated_code) == 1 + two_reductions


def test_a_warm_native_is_captured_and_replays_frozen(mode):
    layer = nn.Linear(256, 256, device="cuda", dtype=torch.bfloat16)

    @dc.native
    def step(q):
        return torch.sigmoid(q * layer.weight[0]) + 1

    q = random(16, 256)
    made = mode.warmup(step, q, tokens=[1, 16])
    assert [event.action for event in made] == ["compiled", "compiled"]
    graph = torch.cuda.CUDAGraph()
    with mode, mode.freeze(), torch.cuda.graph(graph):
        result = step(q)
    for _ in range(3):
        q.copy_(random(16, 256))
        graph.replay()
        torch.testing.assert_close(result, step(q), rtol=1.6e-2, atol=1e-3)
    assert [event.action for event in mode.trace.events] == ["compiled"]


def test_results_are_laid_out_as_in_eager(mode):
    @dc.native
    def laid_out(q):
        return (q.t() + 1)[:, None], (q[:, None] * 2).transpose(0, 1), q.unsqueeze(0).expand(2, *q.shape) + 1

    for count in (7, 2, 1):
        q = random(count, 8)
        with mode:
            actual = laid_out(q)
        assert [one.stride() for one in actual] == [one.stride() for one in laid_out(q)]
    assert [event.action for event in mode.trace.events] == ["compiled"] * 3


def test_division_and_remainder_are_eagers(mode):
    @dc.native
    def divided(q, by):
        return q // by, q % by, torch.div(q, by, rounding_mode="floor"), torch.fmod(q, by), q // 0.1

    values = torch.tensor([0.3, -0.3, 0.6, 1.0, -1e-8, 1e-30, 5.0, 0.0, -0.0, float("inf"), float("nan")])
    q, by = torch.meshgrid(values.cuda(), values.cuda(), indexing="ij")
    for dtype in (torch.float32, torch.bfloat16):
        one, other = q.to(dtype).repeat(8, 8), by.to(dtype).repeat(8, 8)
        with mode:
            actual = divided(one, other)
        for a, e in zip(actual, divided(one, other), strict=True):
            torch.testing.assert_close(a, e, rtol=0.0, atol=0.0, equal_nan=True)
            assert torch.equal(a.signbit() & ~a.isnan(), e.signbit() & ~e.isnan())
