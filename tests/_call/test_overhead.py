"""What a call costs, counted and not timed: the Python and C functions that run in it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

import dispatch_compile as dc


def functions_run(fn: Callable[[], Any]) -> str:
    """The functions that run in ``fn()``, indented by nesting."""
    lines: list[str] = []
    depth = 0

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal depth
        if event == "call":
            lines.append(f"{'  ' * depth}{frame.f_code.co_name}")
            depth += 1
        elif event == "return":
            depth -= 1
        elif event == "c_call" and arg is not sys.setprofile:
            lines.append(f"{'  ' * depth}{arg.__name__} (C)")

    sys.setprofile(profile)
    try:
        fn()
    finally:
        sys.setprofile(None)
    return "\n".join(lines)


@pytest.mark.selective
def test_an_intercepted_call_runs_nothing_but_dispatch_guard_and_code():
    mode = dc.DispatchCompileMode()
    x, weight = torch.randn(4, 64), torch.randn(64)
    op = torch.ops.dispatch_compile.rms_norm.default
    with torch.inference_mode(), mode:
        op(x, weight, 1e-6)
        assert_expected_inline(
            functions_run(lambda: op(x, weight, 1e-6)),
            """\
<lambda>
  __call__
     (C)
    kernel
      get (C)
      get (C)
      dispatch
      call
        len (C)
        len (C)
        check (C)
        is_inference_mode_enabled (C)
        is_inference (C)
        is_inference (C)
        check (C)
        call
          clear (C)
          _empty_strided_cpu (C)
          _empty_strided_cpu (C)
          kernel (C)""",
        )


@pytest.mark.selective
def test_an_op_that_is_not_caught_runs_no_python():
    x = torch.randn(4, 4)
    with dc.DispatchCompileMode():
        assert_expected_inline(
            functions_run(lambda: torch.add(x, x)),
            """\
<lambda>
  add (C)""",
        )


@pytest.mark.selective
def test_entering_and_leaving_is_short():
    mode = dc.DispatchCompileMode()
    with mode:
        pass

    def enter_and_leave() -> None:
        with mode:
            pass

    assert len(functions_run(enter_and_leave).splitlines()) < 60
