"""What watches a program from outside, on either side of a mode: it records what it records without the mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from shipped import PLACES, SHIPPED, OpaqueOps, tensors_in
from support import EAGER, assert_same, outcome
from torch import Tensor
from torch._subclasses.fake_utils import CrossRefFakeMode
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.overrides import TorchFunctionMode
from torch.utils._debug_mode import DebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dispatch_compile as dc

CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@pytest.fixture(scope="module")
def opaque_ops() -> Iterator[OpaqueOps]:
    ops = OpaqueOps()
    yield ops
    ops.destroy()


@pytest.fixture(scope="module")
def cache() -> dc.NativeCache:
    return dc.NativeCache()


def described(values: Any) -> list[Any]:
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors_in(values)]


class DispatchLog(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.record: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = self.call(func, args, kwargs or {})
        self.record.append((str(func), described(args), described(results)))
        return results

    def call(self, func, args, kwargs):
        return func(*args, **kwargs)


class DispatchLogOfBodies(DispatchLog):
    """Stays on while the bodies of ops run, to which it hands their calls on directly."""

    def call(self, func, args, kwargs):
        if func.namespace == "aten":
            return func(*args, **kwargs)
        with self:
            return func.redispatch(CPU_KERNEL, *args, **kwargs)


class FunctionLog(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.record: list[Any] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.record.append((getattr(func, "__name__", str(func)), described(args), described(results)))
        return results


class FlopCount(FlopCounterMode):
    def __init__(self) -> None:
        super().__init__(display=False)

    @property
    def record(self) -> Any:
        return self.get_flop_counts()


class DebugLog(DebugMode):
    @property
    def record(self) -> str:
        return self.debug_string()


class SchemaCheck(SchemaCheckMode):
    """Compares what each op does to its arguments with its schema."""

    @property
    def record(self) -> Any:
        return self.ops


class CrossReference(CrossRefFakeMode):
    """Runs each op on fake tensors too, and compares."""

    record = None


WATCHERS = [DispatchLog, DispatchLogOfBodies, FunctionLog, FlopCount, DebugLog, SchemaCheck, CrossReference]


def watched(
    watcher: Any, beside: AbstractContextManager[Any], side: str, run: Callable[[], Any]
) -> tuple[Any, list[Any]]:
    """The outcome of ``run`` and the watcher's record."""
    with beside if side == "inside" else nullcontext(), watcher, beside if side == "outside" else nullcontext():
        results = outcome(run)
    return results, watcher.record


@pytest.mark.parametrize("name", list(SHIPPED))
@pytest.mark.parametrize("side", ["outside", "inside"])
@pytest.mark.parametrize("kind", WATCHERS)
def test_a_watcher_records_the_same(kind, side, name, opaque_ops, cache):
    """The watcher outside of the mode, and inside it."""
    args = SHIPPED[name].make_args(torch.bfloat16)
    x, eye = args[0], torch.eye(args[0].shape[-1], dtype=torch.bfloat16)
    for place in PLACES:
        call = opaque_ops.call(name, place)

        def run(call: Callable[..., Any] = call) -> Any:
            return call((x @ eye).clone(), *args[1:])

        expected, alone = watched(kind(), nullcontext(), side, run)
        for trace in (True, False):
            mode, before = dc.DispatchCompileMode(config=EAGER, cache=cache, trace=trace), cache.stats()
            actual, beside = watched(kind(), mode, side, run)
            assert_same(actual, expected)
            assert beside == alone
            after = cache.stats()
            caught = 0 if kind is DispatchLogOfBodies else 1
            assert (after.hits - before.hits, after.asides - before.asides) == (caught, 0)
            if trace:
                assert [event.action for event in mode.trace.events] == ["compiled"] * caught


@pytest.mark.xfail(strict=True, reason="a TorchFunctionMode sees the mode's own work when the call comes from C++")
@pytest.mark.parametrize("side", ["outside", "inside"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_a_function_mode_records_the_same_of_calls_from_torchscript(side):
    """Calls from Python take it off its stack, calls from C++ do not: in eager it records the op's body."""

    @torch.jit.script
    def run(x: Tensor) -> Tensor:
        return torch.ops.dispatch_compile.silu_and_mul(x)

    x = torch.randn(4, 16)
    expected, alone = watched(FunctionLog(), nullcontext(), side, lambda: run(x))
    mode = dc.DispatchCompileMode(config=EAGER)
    for _ in range(2):
        actual, beside = watched(FunctionLog(), mode, side, lambda: run(x))
        assert_same(actual, expected)
        assert [name for name, *_ in beside] == [name for name, *_ in alone] == ["chunk", "silu", "mul"]
