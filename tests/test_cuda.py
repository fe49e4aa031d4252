"""What only a GPU shows: alignment, 64-bit indexing, streams and CUDA graphs."""

from __future__ import annotations

import pytest
import torch

import dispatch_compile as dc

pytestmark = pytest.mark.cuda

HIDDEN = 1024


def random(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*size, device="cuda").to(dtype)


def assert_agree(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1.6e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("op", "make_args"),
    [
        (dc.ops.rms_norm, lambda t: (random(t, HIDDEN), random(HIDDEN), 1e-6)),
        (dc.ops.fused_add_rms_norm, lambda t: (random(t, HIDDEN), random(t, HIDDEN), random(HIDDEN), 1e-6)),
        (dc.ops.silu_and_mul, lambda t: (random(t, 2 * HIDDEN),)),
        (dc.ops.gelu_and_mul, lambda t: (random(t, 2 * HIDDEN), "tanh")),
        (dc.ops.quant_fp8_static, lambda t: (random(t, HIDDEN), torch.full((1,), 0.01, device="cuda"))),
        (dc.ops.quant_fp8_per_token, lambda t: (random(t, HIDDEN),)),
        (dc.ops.quant_fp8_per_group, lambda t: (random(t, HIDDEN),)),
        (
            dc.ops.concat_quant_fp8,
            lambda t: (random(t, 8, 512), random(t, 8, 64), torch.full((1,), 0.01, device="cuda")),
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_shipped_op_agrees_with_native_at_every_token_count(op, make_args):
    mode = dc.DispatchCompileMode()
    with torch.inference_mode():
        for tokens in (0, 1, 2, 7, 64, 1000):
            args = make_args(tokens)
            expected = op(*args)
            with mode:
                actual = op(*args)
            for a, e in zip(
                actual if isinstance(actual, tuple) else (actual,),
                expected if isinstance(expected, tuple) else (expected,),
                strict=True,
            ):
                assert (a.dtype, a.shape, a.stride()) == (e.dtype, e.shape, e.stride())
                # A value between two fp8 steps may round to either: one step is an eighth of the value.
                fp8 = a.dtype is torch.float8_e4m3fn
                torch.testing.assert_close(
                    a.float(), e.float(), rtol=0.126 if fp8 else 1.6e-2, atol=2e-3 if fp8 else 1e-3
                )
    assert mode.cache.stats().compiles == 3
    assert mode.cache.stats().hits == 6


def test_misaligned_inputs_are_right():
    mode = dc.DispatchCompileMode()
    flat = random(64 * HIDDEN + 8)
    aligned, misaligned = flat[: 64 * HIDDEN].view(64, HIDDEN), flat[1 : 64 * HIDDEN + 1].view(64, HIDDEN)
    with torch.inference_mode():
        for first, second in [(aligned, misaligned), (misaligned, aligned)]:
            mode.cache.clear()
            for x in (first, second):
                expected = dc.ops.rms_norm(x, None, 1e-6)
                with mode:
                    actual = dc.ops.rms_norm(x, None, 1e-6)
                assert_agree(actual, expected)
    assert mode.cache.stats().hits == 4


def test_more_elements_than_32_bits_can_index():
    mode = dc.DispatchCompileMode(trace=True)
    width = 2**16
    weight = random(width)
    with torch.inference_mode(), mode:
        dc.ops.rms_norm(random(4, width), weight, 1e-6)
        tokens = 2**15 + 2
        x = torch.empty(tokens, width, dtype=torch.bfloat16, device="cuda").normal_()
        assert x.numel() > 2**31
        actual = dc.ops.rms_norm(x, weight, 1e-6)
    assert [event.action for event in mode.trace.events] == ["compiled", "compiled"]
    with torch.inference_mode():
        for rows in (slice(0, 2), slice(tokens - 2, tokens)):
            assert_agree(actual[rows], dc.ops.rms_norm(x[rows], weight, 1e-6))


def test_runs_on_the_current_stream():
    mode = dc.DispatchCompileMode()
    x = random(512, HIDDEN)
    with torch.inference_mode(), mode:
        expected = dc.ops.rms_norm(x, None, 1e-6)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # were the op on another stream, it would not see the values written next
            x.mul_(-1)
            actual = dc.ops.rms_norm(x, None, 1e-6)
        stream.synchronize()
    assert mode.cache.stats().compiles == 1
    torch.testing.assert_close(actual, -expected)


def test_peak_memory_is_that_of_the_result():
    mode = dc.DispatchCompileMode()
    x = random(8192, 4096)
    with torch.inference_mode(), mode:
        dc.ops.silu_and_mul(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = dc.ops.silu_and_mul(x)
        peak = torch.cuda.max_memory_allocated() - before
    assert peak == y.numel() * y.element_size()
