"""``DISPATCH_COMPILE_TRACE``: what every mode prints as it goes."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys

import pytest
import torch
from expecttest import assert_expected_inline
from support import EAGER

import dispatch_compile as dc

pytestmark = pytest.mark.run_once

SCRIPT = """\
import torch

import dispatch_compile as dc


@dc.register_op
def scale(x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
    return x * factor


@torch.library.custom_op("script::inner", mutates_args=())
def inner(x: torch.Tensor) -> torch.Tensor:
    return scale(x, 3.0)


@torch.library.custom_op("script::outer", mutates_args=())
def outer(x: torch.Tensor) -> torch.Tensor:
    return inner(scale(x)) + scale(x)


def new_mode(**options):
    return dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), **options)


first, second, recorded = new_mode(), new_mode(), new_mode(trace=True)
x = torch.ones(4, 3)
with first:
    outer(x)
    with second:  # a call inside both is printed once
        scale(x.t())
with recorded:  # has a trace of its own
    scale(x, 5.0)
with second:
    scale(x[:1])
print(first.trace is not None and first.trace.calls, len(recorded.trace))
"""


def _run(script, value, tmp_path):
    file = tmp_path / "script.py"  # custom_op reads the function's source file
    file.write_text(script)
    environment = {**os.environ, "DISPATCH_COMPILE_TRACE": value}
    return subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, check=False)


def test_every_mode_prints_to_stderr(tmp_path):
    run = _run(SCRIPT, "1", tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "[] 1\n"
    assert_expected_inline(
        run.stderr,
        """\
script::outer(t: f32[4, 3])
  dispatch_compile::scale(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, new: [s0, 3]
  script::inner(t: f32[4, 3])
    dispatch_compile::scale(t: f32[4, 3], 3.0)  ->  t: f32[4, 3]  # compiled native, new: [s0, 3]; factor is 3.0, was not given
  dispatch_compile::scale(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, reused: [s0, 3]
dispatch_compile::scale(t: f32[3, 4][1, 3])  ->  t: f32[3, 4][1, 3]  # compiled native, new: [s0, 4]
dispatch_compile::scale(t: f32[1, 3])  ->  t: f32[1, 3]  # compiled native, new: [1, 3]; x's shape is [1, 3], was [s0, 4]; x's stride is [3, 1], was [1, s0]
""",  # noqa: E501
    )


@pytest.mark.parametrize("value", ["0", ""])
def test_off(value, tmp_path):
    run = _run(SCRIPT, value, tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "False 1\n", "")


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv("DISPATCH_COMPILE_TRACE", "yes")
    with pytest.raises(ValueError, match=r"DISPATCH_COMPILE_TRACE must be 1 .* not 'yes'"):
        dc.DispatchCompileMode()
    assert dc.DispatchCompileMode(trace=True).trace is not None, "not looked at where a trace is given"


def test_prints_to_what_stderr_is_when_the_call_is_made(monkeypatch, capsys):
    monkeypatch.setenv("DISPATCH_COMPILE_TRACE", "1")
    with contextlib.redirect_stderr(io.StringIO()) as gone:
        mode = dc.DispatchCompileMode(config=EAGER)
    gone.close()
    with mode:
        dc.ops.silu_and_mul(torch.ones(4, 6))
    assert capsys.readouterr().err.startswith("dispatch_compile::silu_and_mul(t: f32[4, 6])  ->  t: f32[4, 3]")
