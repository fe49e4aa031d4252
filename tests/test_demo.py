"""The demo: its whole trace, what it says of results that differ, and its command line."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch._subclasses.fake_tensor import FakeTensor

import dispatch_compile as dc
from dispatch_compile.__main__ import main
from dispatch_compile.demo import ir_ops, run
from dispatch_compile.demo.workload import Setup, Workload

pytestmark = pytest.mark.run_once

TOKENS = (1, 8)
SMALL = ("demo", "--device", "cpu", "--scale", "64")


@pytest.fixture(scope="module")
def workloads() -> list[Workload]:
    return run.workloads(Setup("cpu", torch.bfloat16, experts=2, ir=ir_ops.OWN))


@pytest.fixture(scope="module")
def checked(workloads: list[Workload]) -> run.Checked:
    return run.check(workloads, TOKENS)


@pytest.fixture
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MIN_ROUNDS", 1)
    monkeypatch.setattr(run, "MAX_ROUNDS", 1)


def test_trace(checked: run.Checked) -> None:
    assert_expected_inline(
        str(checked.trace),
        """\
dispatch_compile_demo::fused_moe(t: bf16[1, 2048], t: f32[2, 2048], t: f32[2, 1536, 2048], t: f32[2, 2048, 768], 2, 'dispatch_compile')  ->  t: bf16[1, 2048]
  dispatch_compile::silu_and_mul(t: bf16[2, 1536])  ->  t: bf16[2, 768]  # compiled native, new: [s0, 1536]
  dispatch_compile::quant_fp8_per_token(t: bf16[2, 768])  ->  (t: f8e4m3fn[2, 768], t: f32[2, 1])  # compiled native, new: [s0, 768]
dispatch_compile_demo::fused_moe(t: bf16[8, 2048], t: f32[2, 2048], t: f32[2, 1536, 2048], t: f32[2, 2048, 768], 2, 'dispatch_compile')  ->  t: bf16[8, 2048]
  dispatch_compile::silu_and_mul(t: bf16[16, 1536])  ->  t: bf16[16, 768]  # compiled native, reused: [s0, 1536]
  dispatch_compile::quant_fp8_per_token(t: bf16[16, 768])  ->  (t: f8e4m3fn[16, 768], t: f32[16, 1])  # compiled native, reused: [s0, 768]
dispatch_compile_demo::mla_decode(t: bf16[1, 128, 512], t: bf16[1, 128, 64], t: f32[1], t: bf16[1, 512], t: bf16[1, 64], t: bf16[512], t: f32[1, 64, 576], 'dispatch_compile')  ->  t: bf16[1, 128, 512]
  dispatch_compile::rms_norm(t: bf16[1, 512], t: bf16[512], 1e-06)  ->  t: bf16[1, 512]  # compiled native, new: [1, 512], [512]
  dispatch_compile::concat_quant_fp8(t: bf16[1, 128, 512], t: bf16[1, 128, 64], t: f32[1])  ->  t: f8e4m3fn[1, 128, 576]  # compiled native, new: [1, 128, 512], [1, 128, 64], [1]
dispatch_compile_demo::mla_decode(t: bf16[8, 128, 512], t: bf16[8, 128, 64], t: f32[1], t: bf16[8, 512], t: bf16[8, 64], t: bf16[512], t: f32[8, 64, 576], 'dispatch_compile')  ->  t: bf16[8, 128, 512]
  dispatch_compile::rms_norm(t: bf16[8, 512], t: bf16[512], 1e-06)  ->  t: bf16[8, 512]  # compiled native, new: [s0, 512], [512]; x's shape is [s0, 512], was [1, 512]
  dispatch_compile::concat_quant_fp8(t: bf16[8, 128, 512], t: bf16[8, 128, 64], t: f32[1])  ->  t: f8e4m3fn[8, 128, 576]  # compiled native, new: [s0, 128, 512], [s0, 128, 64], [1]; x_latent's shape is [s0, 128, 512], was [1, 128, 512]; x_rope's shape is [s0, 128, 64], was [1, 128, 64]""",  # noqa: E501
    )


def test_summary(checked: run.Checked) -> None:
    assert_expected_inline(
        checked.trace.summary(seconds=False),
        """\
op                                     provider  calls  compiled  eager  aside  specializations
dispatch_compile::concat_quant_fp8     native        2         2      0      0                2
dispatch_compile::quant_fp8_per_token  native        2         2      0      0                1
dispatch_compile::rms_norm             native        2         2      0      0                2
dispatch_compile::silu_and_mul         native        2         2      0      0                1""",
    )


def test_results_agree(checked: run.Checked) -> None:
    assert checked.mismatches == []


def test_compiled_code_ran(checked: run.Checked) -> None:
    stats = checked.cache.stats()
    assert (stats.compiles, stats.fallbacks, stats.asides) == (6, 0, 0)
    assert stats.hits >= len(checked.trace) == 8


@pytest.mark.usefixtures("one_round")
def test_measuring_runs_the_compiled_code_that_was_checked(workloads: list[Workload], checked: run.Checked) -> None:
    before, traced = checked.cache.stats(), len(checked.trace)
    measurements = run.measure(workloads, TOKENS, checked.cache)
    after = checked.cache.stats()
    assert (after.compiles, after.hits - before.hits) == (before.compiles, 8)
    assert len(checked.trace) == traced
    assert [(m.name, m.tokens) for m in measurements] == [
        (name, tokens) for name in ("fused_moe", "mla_decode") for tokens in TOKENS
    ]


@pytest.mark.usefixtures("one_round")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_zero_and_more_tokens(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--tokens", "0,3", "--dtype", dtype]) == 0
    out, err = capsys.readouterr()
    assert "8 compilations of 4 implementations; 8 calls ran compiled code" in out
    assert f"{dtype}, 2 of 128 experts" in out
    assert [line.split()[:2] for line in out.splitlines()[-4:]] == [
        ["fused_moe", "0"], ["fused_moe", "3"], ["mla_decode", "0"], ["mla_decode", "3"],
    ]  # fmt: skip
    assert "compiling (first calls): fused_moe, 3 tokens" in err
    assert "compiled dispatch_compile::silu_and_mul (native) for [s0, 1536]" in err


def test_compiled_code_that_computes_something_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    native = dc.ops.silu_and_mul.impls["native"]
    right = native.impl_fn

    def wrong_when_captured(x: Any) -> Any:
        return right(x) * 1.5 if isinstance(x, FakeTensor) else right(x)

    monkeypatch.setattr(native, "impl_fn", wrong_when_captured)
    assert main([*SMALL, "--tokens", "4"]) == 1
    out, err = capsys.readouterr()
    assert "Time per call" not in out
    (mismatch,) = [line for line in err.splitlines() if line.startswith("MISMATCH")]
    assert mismatch.startswith("MISMATCH: fused_moe at 4 tokens: ")
    assert "Greatest absolute difference: " in mismatch


@pytest.mark.parametrize("index", [0, 1], ids=["fused_moe", "mla_decode"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_difference_beyond_the_tolerance_is_seen(workloads: list[Workload], index: int, tokens: int) -> None:
    expected = workloads[index].op(*workloads[index].arguments(tokens))
    assert run.difference(expected.clone(), expected) is None
    typical = expected.float().square().mean().sqrt()
    one_off = expected.clone()
    one_off.view(-1)[-1] += 0.5 * typical
    assert "Mismatched elements: 1 /" in str(run.difference(one_off, expected))
    assert "root mean square of the difference" in str(run.difference(expected + 0.05 * typical, expected))
    assert run.difference(expected.float(), expected) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--tokens", "1,two"], "'1,two' is not a list of whole numbers like 1,8,64"),
        (["--tokens", ""], "'' is not a list of whole numbers like 1,8,64"),
        (["--tokens=-1"], "'-1' has a negative number of tokens"),
        (["--scale", "0"], "'0' is not a whole number from 1 to 128"),
        (["--scale", "129"], "'129' is not a whole number from 1 to 128"),
        (["--scale", "1.5"], "'1.5' is not a whole number from 1 to 128"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["demo", *arguments])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_cuda_is_asked_for_and_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_info:
        main(["demo", "--device", "cuda"])
    assert exit_info.value.code == 2
    assert "--device cuda: torch finds no CUDA device" in capsys.readouterr().err


def test_vllm_is_asked_for_and_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ir_ops.ir_ops.cache_clear()
    for name in ("vllm", "vllm.ir"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as exit_info:
        main([*SMALL, "--vllm"])
    assert exit_info.value.code == 2
    assert "vLLM with vllm.ir is needed" in capsys.readouterr().err


@pytest.mark.vllm
@pytest.mark.usefixtures("one_round")
def test_ir_ops_of_the_real_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--vllm", "--tokens", "1,8"]) == 0
    out = capsys.readouterr().out
    assert "vllm_ir::rms_norm(t: bf16[8, 512], t: bf16[512], 1e-06)  ->  t: bf16[8, 512]  # compiled native, new" in out
    assert "vllm_ir::gelu_and_mul_sparse(t: bf16[16, 1536], " in out
    assert "6 compilations of 4 implementations; 8 calls ran compiled code" in out


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--help"], 0, "  demo  a fused MoE"),
        (["demo", "--help"], 0, "usage: python -m dispatch_compile demo"),
        (["dream"], 2, "invalid choice: 'dream'"),
        ([], 2, "the following arguments are required: COMMAND"),
    ],
)
def test_commands(arguments: list[str], status: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == status
    assert text in "".join(capsys.readouterr())


def test_the_exit_status_leaves_the_process() -> None:
    command = [sys.executable, "-m", "dispatch_compile", "demo", "--tokens", "x"]
    assert subprocess.run(command, capture_output=True).returncode == 2
