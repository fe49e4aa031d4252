"""Dynamo runs Python frames that it does not trace with its hook still on, and must leave ours alone."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.convert_frame as convert_frame

import dispatch_compile as dc


@pytest.fixture
def frames_that_dynamo_sees(monkeypatch):
    """The file names of the frames that Dynamo considers."""
    seen = []
    considered = convert_frame.ConvertFrameAssert.__call__

    def recorded(self, frame, *args, **kwargs):
        seen.append(frame.f_code.co_filename)
        return considered(self, frame, *args, **kwargs)

    monkeypatch.setattr(convert_frame.ConvertFrameAssert, "__call__", recorded)
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


def test_an_ir_op_in_a_frame_that_dynamo_skips_runs_compiled_and_untraced(frames_that_dynamo_sees):
    op = torch.ops.dispatch_compile.rms_norm.default

    def skipped(x: torch.Tensor, path: str) -> torch.Tensor:
        with open(path):  # a graph break inside a block that Dynamo cannot resume makes it skip the frame
            torch._dynamo.graph_break()
            return op(x, None, 1e-6)

    mode = dc.DispatchCompileMode()
    x = torch.randn(4, 16)
    expected = op(x, None, 1e-6)
    compiled = torch.compile(skipped)
    with mode:
        for _ in range(3):
            torch.testing.assert_close(compiled(x, __file__), expected)
    assert mode.cache.stats().hits == 3
    assert __file__ in frames_that_dynamo_sees
    ours = [name for name in frames_that_dynamo_sees if "dispatch_compile" in name and name != __file__]
    assert ours == []
    assert not any("torchinductor" in name for name in frames_that_dynamo_sees)


def test_a_mode_entered_in_a_compiled_function_changes_no_result():
    mode = dc.DispatchCompileMode()

    def entering(x: torch.Tensor) -> torch.Tensor:
        with mode:
            return dc.ops.rms_norm(x * 2, None, 1e-6) + 1

    x = torch.randn(4, 16)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(entering, backend="aot_eager")(x), entering(x))
