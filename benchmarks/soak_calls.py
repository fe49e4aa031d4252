"""The calls that ``soak`` makes: what an engine does all day, and what it does now and then."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dispatch_compile import (
    CompileConfig,
    CompileError,
    DispatchCompileMode,
    IrOp,
    NativeCache,
    Trace,
    inherit_modes,
    ops,
    register_op,
)
from dispatch_compile.demo import ir_ops, mla, moe
from dispatch_compile.demo.run import difference
from dispatch_compile.demo.workload import Setup

from .cases import CASES, Inputs, Sizes
from .proof import Broken, check_result

HIDDEN = 512
TOKENS = (1, 3, 16, 64)
DTYPES = (torch.bfloat16, torch.float32)
BODY_TOKENS = 5
BURST = 100  # calls made one after another in one mode
CHECKED = 1 / 20  # of a burst's results
NAMES = 8  # under which a thread registers ops, over and over again
SECONDS_FOR_A_CHILD = 60.0


@dataclass(frozen=True)
class Prepared:
    """A call, and what it gives in eager."""

    op: Callable[..., Any]
    arguments: tuple[Any, ...]
    expected: Any


class Engines:
    """Modes as several engines in one process have them, and the calls that are made in them.

    Attributes:
        plain: compiles when a call needs it.
        background: compiles beside the calls, into a cache of its own.
        bounded: keeps so few specializations that it drops and makes some all the time.
        lenient, strict: what they do with a native implementation that cannot be compiled.
        calls: of the ops that ship.
        bodies: of opaque ops that call such ops.
        uncompilable: an op that cannot be captured.
    """

    def __init__(self, device: str, backend: str) -> None:
        self.device, self.backend = device, backend
        self.plain = _mode(backend)
        self.background = _mode(backend, on_new="background")
        self.bounded = _mode("eager", max_specializations=2, eviction="lru")
        self.lenient = _mode("eager")
        self.strict = _mode("eager", on_failure="raise")
        self.calls = [
            _prepared(case.op, case.arguments(Inputs(Sizes(tokens, HIDDEN, dtype, device))))
            for case in CASES.values()
            for tokens in TOKENS
            for dtype in DTYPES
        ]
        setup = Setup(device, torch.bfloat16, experts=4, ir=ir_ops.OWN)
        workloads = [moe.workload(setup), mla.workload(setup)]
        self.bodies = [_prepared(work.op, work.arguments(BODY_TOKENS)) for work in workloads]
        self.uncompilable = register_op(name="soak_uncompilable")(_uncompilable)

    def close(self) -> None:
        self.uncompilable.unregister()


def _mode(backend: str, **options: Any) -> DispatchCompileMode:
    return DispatchCompileMode(config=CompileConfig(backend=backend, **options), cache=NativeCache())


def _prepared(op: Callable[..., Any], arguments: tuple[Any, ...]) -> Prepared:
    return Prepared(op, arguments, op(*arguments))


def _uncompilable(x: Tensor) -> Tensor:
    if x.shape[-1] % 2:
        raise ValueError("an odd number of columns")
    return x * float(x.amax().item())


class Worker:
    """A thread's work: it draws an activity again and again.

    Attributes:
        calls: how many calls it made in modes, by activity.
        checked: how many results it compared with eager.
        errors: what went wrong, by activity and text.
    """

    def __init__(self, number: int, engines: Engines) -> None:
        self.number, self.engines = number, engines
        self.random = random.Random(number)
        self.calls: Counter[str] = Counter()
        self.checked = 0
        self.errors: Counter[str] = Counter()
        self._registered = 0

    def run(self, stop: threading.Event) -> None:
        """Work until told to stop."""
        self.do("bodies")  # the first matrix product of a thread takes a workspace for cuBLAS, 32 MiB on an H100
        drawn = activities(self.engines.device)
        names, weights = list(drawn), list(drawn.values())
        while not stop.is_set():
            [name] = self.random.choices(names, weights)
            self.do(name)

    def do(self, name: str) -> None:
        """One activity, whatever becomes of it."""
        try:
            self.calls[name] += getattr(self, name)()
        except Exception as error:
            self.errors[f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"] += 1

    def _check(self, prepared: Prepared, result: Any) -> None:
        self.checked += 1
        check_result(result, prepared.expected)

    def _burst(self, mode: DispatchCompileMode, count: int) -> int:
        choose, draw = self.random.choice, self.random.random
        with mode:
            for _ in range(count):
                prepared = choose(self.engines.calls)
                result = prepared.op(*prepared.arguments)
                if draw() < CHECKED:
                    self._check(prepared, result)
        return count

    # ---- The activities; each gives the number of its calls

    def plain(self) -> int:
        return self._burst(self.engines.plain, BURST)

    def background(self) -> int:
        return self._burst(self.engines.background, BURST)

    def evicting(self) -> int:
        return self._burst(self.engines.bounded, 4)

    def nested(self) -> int:
        with self.engines.plain:
            inside = inherit_modes(lambda: self._burst(self.engines.background, BURST // 2))
        return inside() + self._burst(self.engines.plain, BURST // 2)

    def bodies(self) -> int:
        """Opaque ops that call IR ops."""
        for prepared in self.engines.bodies:
            with self.engines.plain:
                result = prepared.op(*prepared.arguments)
            self.checked += 1
            off = difference(result, prepared.expected)
            if off is not None:
                raise Broken(off)
        return len(self.engines.bodies)

    def in_place(self) -> int:
        arguments = self.random.choice(self._fused_add_rms_norms()).arguments
        expected = ops.fused_add_rms_norm(*arguments)
        copies = [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]
        overload = ops.fused_add_rms_norm.maybe_inplace
        assert overload is not None
        with self.engines.plain:
            result = overload(*copies)
        self.checked += 1
        check_result(result, expected)
        return 1

    def _fused_add_rms_norms(self) -> Sequence[Prepared]:
        return [prepared for prepared in self.engines.calls if prepared.op is ops.fused_add_rms_norm]

    def aside(self) -> int:
        """Calls that nothing is compiled for: of arguments that require gradients."""
        x = torch.randn(3, HIDDEN, device=self.engines.device, requires_grad=True)
        with self.engines.plain:
            result = ops.silu_and_mul(x)
        self.checked += 1
        check_result(result, ops.silu_and_mul(x))
        if not result.requires_grad:
            raise Broken("the result has lost its gradient")
        return 1

    def failing(self) -> int:
        """An op that cannot be compiled, and one that raises an error of its own."""
        op, x = self.engines.uncompilable, torch.ones(3, 4, device=self.engines.device) * 2
        with self.engines.lenient:
            self.checked += 1
            check_result(op(x), x * 2)
            _expect(ValueError, op, x[:, :3].contiguous())
        with self.engines.strict:
            _expect(CompileError, op, x)
        return 3

    def registering(self) -> int:
        """An op that comes, with a second provider, and goes."""
        factor = self._registered % 3 + 2
        name = f"soak_{self.number}_{self._registered % NAMES}"
        self._registered += 1
        x = torch.randn(5, 8, device=self.engines.device)

        def native(x: Tensor) -> Tensor:
            return x * factor

        op = register_op(name=name)(native)
        try:
            op.register_impl("other")(native)
            return self._call_registered(op, x, factor)
        finally:
            op.unregister()

    def _call_registered(self, op: IrOp, x: Tensor, factor: int) -> int:
        # Now and then by the real backend: one kernel of three, which it has made before.
        mode = self.engines.plain if self.random.random() < 0.1 else self.engines.bounded
        with mode:
            results = [op(x), op(x)]
            with op.set_priority(["other"]):
                results.append(op(x))
        for result in results:
            self.checked += 1
            check_result(result, x * factor)
        return len(results)

    def traced(self) -> int:
        """A mode of its own that traces, and goes: with it the hooks of opaque ops come and go."""
        trace = Trace()
        mode = DispatchCompileMode(config=self.engines.plain.config, cache=self.engines.plain.cache, trace=trace)
        count = self._burst(mode, 5)
        if [event.action for event in trace.events] != ["compiled"] * count:
            raise Broken(f"a trace of {count} calls has {[(event.op, event.action) for event in trace.events]}")
        return count

    def clearing(self) -> int:
        rarely = self.random.random() < 0.02  # all is compiled again, one after another
        (self.engines.plain if rarely else self.engines.bounded).cache.clear()
        return 0

    def child(self) -> int:
        """A child that lives for one call."""
        prepared = self.random.choice(self.engines.calls)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                with self.engines.plain:
                    check_result(prepared.op(*prepared.arguments), prepared.expected)
                status = 0
            finally:
                os._exit(status)
        self.checked += 1
        status = _status_of(pid)
        if status:
            raise Broken(f"a child ended with {status}")
        return 1


def _status_of(pid: int) -> int:
    deadline = time.monotonic() + SECONDS_FOR_A_CHILD
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise Broken(f"a child did not end within {SECONDS_FOR_A_CHILD:.0f} s")


def _expect(error: type[Exception], op: Callable[..., Any], x: Tensor) -> None:
    try:
        op(x)
    except error:
        return
    raise Broken(f"no {error.__name__} where there should be one")


def activities(device: str) -> dict[str, int]:
    """The methods of a worker, each with how often it is drawn."""
    drawn = {
        Worker.plain: 40,
        Worker.background: 16,
        Worker.nested: 8,
        Worker.bodies: 2,
        Worker.in_place: 10,
        Worker.aside: 10,
        Worker.failing: 10,
        Worker.evicting: 4,
        Worker.registering: 6,
        Worker.traced: 6,
        Worker.clearing: 1,
    }
    if device == "cpu":  # CUDA does not work in a forked child
        drawn[Worker.child] = 1
    return {method.__name__: weight for method, weight in drawn.items()}
