"""Other dispatch modes, on either side: they see the same ops as without ours, and IR ops still run compiled."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext

import pytest
import torch
from support import EAGER, assert_same
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._debug_mode import DebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dispatch_compile as dc

CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class LoggingMode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class DeepLoggingMode(LoggingMode):
    """Stays on while an op's body runs, and so sees inside opaque ops."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        if func.namespace == "aten":
            return func(*args, **(kwargs or {}))
        with self:
            return func.redispatch(CPU_KERNEL, *args, **(kwargs or {}))


@pytest.fixture
def program(counted, define_opaque):
    def body(x: Tensor) -> Tensor:
        return counted(x.sin()).cos()

    op = define_opaque(body)

    def run(x: Tensor) -> Tensor:
        return op(x @ x) + counted(x)

    return run


SIDES = ["outside", "inside"]


def run_beside(other, program, x: Tensor, side: str | None, mode: dc.DispatchCompileMode | None = None):
    modes = {None: [other], "outside": [other, mode], "inside": [mode, other]}[side]
    with ExitStack() as entered:
        for one in modes:
            entered.enter_context(one)
        return program(x)


@pytest.mark.parametrize("side", SIDES)
def test_logging_mode_sees_the_same_and_natives_run_compiled(side, program, counted):
    x, mode, alone, beside = torch.randn(4, 4), dc.DispatchCompileMode(config=EAGER), LoggingMode(), LoggingMode()
    expected = run_beside(alone, program, x, None)
    assert_same(run_beside(beside, program, x, side, mode), expected)
    assert beside.ops == alone.ops
    assert len(alone.ops) == 4
    assert mode.cache.stats().hits == 2


@pytest.mark.parametrize("side", SIDES)
def test_mode_that_watches_bodies_sees_the_same(side, program, counted):
    x, mode = torch.randn(4, 4), dc.DispatchCompileMode(config=EAGER)
    alone, beside = DeepLoggingMode(), DeepLoggingMode()
    expected = run_beside(alone, program, x, None)
    assert_same(run_beside(beside, program, x, side, mode), expected)
    assert "aten.sin.default" in alone.ops, "the mode was expected to see inside the opaque op"
    assert beside.ops == alone.ops
    assert mode.cache.stats().hits == 0


@pytest.mark.parametrize("side", SIDES)
def test_mode_inside_an_opaque_body_sees_the_same(side, counted, define_opaque):
    x, mode = torch.randn(4, 4), dc.DispatchCompileMode(config=EAGER)

    def logged(beside: dc.DispatchCompileMode | None) -> list[str]:
        log = LoggingMode()
        modes = [log, beside or nullcontext()] if side == "outside" else [beside or nullcontext(), log]

        def body(x: Tensor) -> Tensor:
            with modes[0], modes[1]:
                return counted(x.sin()) + 1

        define_opaque(body)(x)
        return log.ops

    assert logged(mode) == logged(None)
    assert mode.cache.stats().hits == 1


@pytest.mark.parametrize("side", SIDES)
def test_flop_counter_counts_the_same(side, define_opaque, define_ir_op):
    def project(x: Tensor) -> Tensor:
        return x @ x.t()

    op = define_ir_op(project)

    def body(x: Tensor) -> Tensor:
        return op(x) @ x

    opaque = define_opaque(body)

    def run(x: Tensor) -> Tensor:
        return opaque(x @ x)

    x, mode = torch.randn(4, 4), dc.DispatchCompileMode(config=EAGER)
    alone, beside = FlopCounterMode(display=False), FlopCounterMode(display=False)
    expected = run_beside(alone, run, x, None)
    assert_same(run_beside(beside, run, x, side, mode), expected)
    assert beside.get_flop_counts() == alone.get_flop_counts()
    assert alone.get_total_flops() > 0
    assert mode.cache.stats().hits == 1


@pytest.mark.parametrize("side", SIDES)
def test_debug_mode_prints_the_same(side, program):
    x, mode, alone, beside = torch.randn(4, 4), dc.DispatchCompileMode(config=EAGER), DebugMode(), DebugMode()
    expected = run_beside(alone, program, x, None)
    assert_same(run_beside(beside, program, x, side, mode), expected)
    assert beside.debug_string() == alone.debug_string()
    assert "dispatch_compile_test::" in alone.debug_string()
    assert mode.cache.stats().hits == 2


@pytest.mark.parametrize("side", SIDES)
def test_fake_tensor_mode_stays_fake(side, counted):
    mode, fake_mode = dc.DispatchCompileMode(config=EAGER), FakeTensorMode()

    def run(_: Tensor) -> Tensor:
        return counted(torch.empty(4, 3))

    result = run_beside(fake_mode, run, torch.empty(0), side, mode)
    assert isinstance(result, FakeTensor)
    assert result.shape == (4, 3)
    assert mode.cache.stats() == dc.CacheStats(compiles=0, hits=0, fallbacks=0, asides=0)


@pytest.mark.parametrize("kind", [LoggingMode, lambda: FlopCounterMode(display=False), DebugMode, FakeTensorMode])
def test_nothing_of_ours_is_left_behind(kind, program):
    x = torch.randn(4, 4)
    with dc.DispatchCompileMode(config=EAGER), kind():
        program(torch.empty(4, 4) if kind is FakeTensorMode else x)
    assert torch._C._len_torch_dispatch_stack() == 0
    assert type(program(x)) is Tensor
