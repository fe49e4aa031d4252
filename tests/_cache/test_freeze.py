"""A frozen mode serves what it has code for, and makes nothing."""

from __future__ import annotations

import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support import EAGER, EAGER_OR_NATIVE, GatedBackend, assert_same, outcome
from torch import Tensor

import dispatch_compile as dc

FROZEN, COMPILED = ("eager", "frozen"), ("compiled", None)


def told(mode: dc.DispatchCompileMode) -> list[tuple[str, str | None]]:
    return [(event.action, event.reason) for event in mode.trace.events]


def warmed(counted: Any, **config: Any) -> dc.DispatchCompileMode:
    """A mode with code for rows of 3 numbers, but not for a single one."""
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", **config), trace=True)
    mode.warmup(counted.op, torch.randn(4, 3), tokens=[4])
    return mode


@pytest.fixture
def nothing_can_be_made(monkeypatch):
    """From the call of this on, whatever captures, compiles or starts a process raises."""
    import torch._dynamo.convert_frame
    import torch._inductor.compile_fx
    import torch.fx.experimental.proxy_tensor

    def refuse(owner: object, name: str) -> None:
        def refused(*args: object, **kwargs: object) -> None:
            raise AssertionError(f"{name} was called")

        monkeypatch.setattr(owner, name, refused)

    def from_now_on() -> None:
        for owner, name in (
            (torch._inductor.compile_fx, "compile_fx"),
            (torch._inductor.compile_fx, "compile_fx_inner"),
            (torch._dynamo.convert_frame, "_compile"),
            (torch._dynamo, "optimize"),
            (torch, "compile"),
            (torch.fx.experimental.proxy_tensor, "make_fx"),
            (torch.fx.Graph, "__init__"),
            (torch.fx.Tracer, "trace"),
            (subprocess.Popen, "__init__"),
        ):
            refuse(owner, name)

    return from_now_on


@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_serves_while_nothing_can_be_made(nothing_can_be_made, monkeypatch, tmp_path):
    monkeypatch.setenv("DISPATCH_COMPILE_CACHE_DIR", str(tmp_path))  # nothing is looked for there either
    weight = torch.randn(48)
    ops = {dc.ops.rms_norm: (weight, 1e-6), dc.ops.silu_and_mul: (), dc.ops.quant_fp8_per_token: ()}
    mode = dc.DispatchCompileMode(trace=True)
    for op, others in ops.items():
        mode.warmup(op, torch.randn(8, 48), *others, tokens=[1, 8])
    inputs = {n: torch.randn(n, 48) for n in (1, 2, 64)}
    not_warmed = [torch.randn(0, 48), torch.randn(4, 48, dtype=torch.bfloat16), torch.randn(48, 4).t()]
    eagerly = [[outcome(op, x, *others) for x in not_warmed] for op, others in ops.items()]
    expected = []
    with mode:
        for op, others in ops.items():
            expected.append([op(x, *others) for x in inputs.values()])
    mode.trace.clear()
    compiles = mode.cache.stats().compiles
    nothing_can_be_made()

    def serve() -> None:
        with mode:
            for (op, others), results, native in zip(ops.items(), expected, eagerly, strict=True):
                for x, result in zip(inputs.values(), results, strict=True):
                    assert_same(op(x, *others), result)
                for x, result in zip(not_warmed, native, strict=True):
                    assert_same(outcome(op, x, *others), result)

    with mode.freeze():
        serve()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(serve).result(60)
        assert told(mode) == 2 * len(ops) * [*3 * [COMPILED], *3 * [FROZEN]]
    assert mode.cache.stats().compiles == compiles
    mode.trace.clear()
    with mode:  # or the above would prove nothing
        dc.ops.silu_and_mul(not_warmed[1])
    assert "was called" in mode.trace.events[0].reason


def test_counted_and_warned_of_once_for_each_op(counted):
    mode = warmed(counted)
    mode.freeze()
    with warnings.catch_warnings(record=True) as caught, mode:
        warnings.simplefilter("always")
        for x in (torch.ones(1, 3), torch.ones(1, 3), torch.ones(4, 3, dtype=torch.float64)):
            assert_same(counted(x), x * 2 + 1)
        assert_same(counted(torch.ones(9, 3)), torch.full((9, 3), 3.0))
        dc.ops.silu_and_mul(torch.ones(2, 4))
    assert mode.cache.stats() == dc.CacheStats(compiles=1, hits=2, fallbacks=4, asides=0)
    name = counted.op.torch_op.name()
    assert [str(one.message) for one in caught] == [
        f"there is no code of the 'native' implementation of {name} for this call (x's shape is [1, 3], was [s0, 3]), "
        f"and the mode is to make none. Add to the warm-up: mode.warmup('{name}', t: f32[1, 3]). It runs eagerly",
        "there is no code of the 'native' implementation of dispatch_compile::silu_and_mul for this call, and the mode "
        "is to make none. Add to the warm-up: mode.warmup('dispatch_compile::silu_and_mul', t: f32[2, 4]). "
        "It runs eagerly",
    ]
    assert mode.cache._counters[f"{name}.default"].reasons == {"frozen": 3}


@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_freezing_and_thawing(counted):
    mode, x = warmed(counted), torch.ones(1, 3)
    mode.thaw()  # harmless
    with mode.freeze():
        with mode.freeze(), mode:
            counted(x)
        with mode:
            counted(x)
    assert told(mode) == [FROZEN, FROZEN]
    mode.freeze()
    with pytest.raises(RuntimeError, match=r"the mode is frozen.*thaw\(\) it first"):
        mode.warmup(counted.op, x)
    mode.thaw()
    with mode:
        counted(x)
    assert told(mode)[2:] == [COMPILED]


@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_ops_that_come_later_are_frozen_too(define_ir_op):
    def negated(x: Tensor) -> Tensor:
        return -x

    mode = dc.DispatchCompileMode(config=EAGER, trace=True)
    mode.freeze()
    op = define_ir_op(negated)
    with mode:
        op(torch.ones(2, 3))
    assert told(mode) == [FROZEN]


@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_another_mode_goes_on_compiling(counted):
    mode, x = warmed(counted), torch.ones(1, 3)
    other = dc.DispatchCompileMode(config=mode.config, cache=mode.cache, trace=True)
    mode.freeze()
    for one in (mode, other, mode):
        with one:
            counted(x)
    assert (told(mode), told(other)) == ([FROZEN, COMPILED], [COMPILED])


@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_what_was_saved_is_not_loaded(counted, tmp_path):
    mode = dc.DispatchCompileMode()
    mode.warmup(dc.ops.silu_and_mul, torch.ones(4, 8))
    mode.cache.save(tmp_path / "saved")
    frozen = dc.DispatchCompileMode(cache=dc.NativeCache.load(tmp_path / "saved"), trace=True)
    with frozen.freeze(), frozen:
        dc.ops.silu_and_mul(torch.ones(4, 8))
    with frozen:
        dc.ops.silu_and_mul(torch.ones(4, 8))
    assert told(frozen) == [FROZEN, COMPILED]
    assert frozen.cache.stats().loads == 1


def test_explained(counted):
    mode = warmed(counted)
    mode.freeze()
    explanation = mode.explain(counted.op, torch.ones(1, 3))
    assert (explanation.action, explanation.reason, explanation.raises) == ("eager", "frozen", False)
    assert mode.explain(counted.op, torch.ones(7, 3)).action == "compiled"


# ---- From the start: on_new


@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_native_from_the_start(counted):
    mode = warmed(counted, on_new="native")
    with mode:
        for n in (7, 1):
            assert_same(counted(torch.ones(n, 3)), torch.full((n, 3), 3.0))
    assert told(mode) == [COMPILED, FROZEN]
    mode.thaw()  # undoes freeze() alone
    with mode:
        counted(torch.ones(1, 3))
    assert told(mode)[2:] == [FROZEN]


@pytest.mark.parametrize("freeze", [False, True])
def test_raising_from_the_start(freeze, counted):
    mode = warmed(counted, on_new="raise")
    if freeze:
        mode.freeze()
    runs = counted.python_runs
    with mode:
        assert_same(counted(torch.ones(7, 3)), torch.full((7, 3), 3.0))
        for _ in range(2):
            with pytest.raises(dc.CompileError, match=r"Add to the warm-up: mode.warmup\(.*, t: f32\[1, 3\]\)$"):
                counted(torch.ones(1, 3))
    assert counted.python_runs == runs
    assert mode.cache.stats().fallbacks == 2
    explanation = mode.explain(counted.op, torch.ones(1, 3))
    assert (explanation.reason, explanation.raises) == ("frozen", True)


# ---- While something is compiled


@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_frozen_while_the_background_compiles(counted):
    """What it is at is finished; what waits is not begun."""
    backend, x = GatedBackend(), torch.ones(4, 3)
    config = dc.CompileConfig(backend=backend, on_new="background")
    mode = dc.DispatchCompileMode(config=config, trace=True)
    try:
        with mode:
            counted(x)
            assert backend.begun.wait(60)
            counted(torch.ones(1, 3))
            mode.freeze()
            counted(x)
            backend.gate.set()
            assert mode.cache.wait(60)
            counted(x)
            counted(torch.ones(1, 3))
            mode.thaw()
            counted(torch.ones(1, 3))
            assert mode.cache.wait(60)
            counted(torch.ones(1, 3))
    finally:
        backend.gate.set()
    waiting = ("eager", "is being compiled in the background")
    assert told(mode) == [waiting, waiting, FROZEN, COMPILED, FROZEN, waiting, COMPILED]
    assert len(backend.threads) == 2


@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_frozen_while_threads_wait_to_compile(counted):
    backend = GatedBackend()
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend=backend))

    def call(n: int) -> Tensor:
        with mode:
            return counted(torch.ones(n, 3))

    with ThreadPoolExecutor(2) as pool:
        try:
            first = pool.submit(call, 4)
            assert backend.begun.wait(60)
            second = pool.submit(call, 1)
            mode.freeze()
        finally:
            backend.gate.set()
        assert_same(first.result(60), torch.full((4, 3), 3.0))
        assert_same(second.result(60), torch.full((1, 3), 3.0))
    assert (mode.cache.stats().compiles, mode.cache.stats().fallbacks) == (1, 1)


def test_costs_no_call_that_has_its_code_anything(counted):
    """The same functions run in the kernel as in a mode that is not frozen; tests/_call/test_overhead.py has those."""
    mode = dc.DispatchCompileMode(config=EAGER_OR_NATIVE)
    mode.warmup(counted.op, torch.randn(4, 3))
    x = torch.randn(4, 3)
    assert calls_in(mode, counted, x) == calls_in(mode, counted, x, frozen=True)


def calls_in(mode: dc.DispatchCompileMode, op: Any, x: Tensor, frozen: bool = False) -> list[str]:
    import sys

    names: list[str] = []
    if frozen:
        mode.freeze()
    with mode:
        op(x)
        sys.setprofile(lambda frame, event, argument: names.append(frame.f_code.co_name) if event == "call" else None)
        try:
            op(x)
        finally:
            sys.setprofile(None)
    return names
