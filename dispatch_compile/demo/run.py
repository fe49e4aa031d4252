"""Run the demo's ops eagerly and under the mode: are the results the same, and what does a call take?"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from .. import DispatchCompileMode, NativeCache, Trace
from . import mla, moe
from .workload import Setup, Workload

# How far two results may be apart that differ only in the order of additions. The values are those with which
# vLLM compares implementations of an IR op (vllm/ir/tolerances.py).
RTOL = {torch.bfloat16: 1.6e-2, torch.float16: 1e-3, torch.float32: 1.3e-6}

# In front of a quantization such a difference can carry a value over the boundary to the next float8 value, an eighth
# away. If every value there is off by a bfloat16 step, as where a backend skips a rounding that the native code has,
# one in 16 is carried over, and a sum of many such values is off by a share of sqrt(1 / 16) / 8. That is what all
# results may be off by on average, in units of a typical result. The largest of a million normally distributed
# differences is five times the average; eight leaves room.
AVERAGE_OFF = 1 / 32
LARGEST_OFF = 8 * AVERAGE_OFF

MIN_ROUNDS, MAX_ROUNDS = 3, 50
SECONDS_PER_MEASUREMENT = 1.0


@dataclass(frozen=True)
class Checked:
    """What came of running everything once.

    Attributes:
        trace: every call under the mode.
        cache: the compiled code.
        mismatches: for each result that is not as in eager, a text that says which and by how much.
    """

    trace: Trace
    cache: NativeCache
    mismatches: list[str]


@dataclass(frozen=True)
class Measurement:
    """Median seconds per call."""

    name: str
    tokens: int
    eager: float
    compiled: float


def workloads(setup: Setup) -> list[Workload]:
    """The demo's ops, with weights."""
    return [moe.workload(setup), mla.workload(setup)]


def check(workloads: Sequence[Workload], token_counts: Sequence[int]) -> Checked:
    """Run each op at each token count eagerly and under a tracing mode, and compare the results."""
    mode = DispatchCompileMode(trace=True)
    assert mode.trace is not None
    mismatches = []
    for workload in workloads:
        for tokens in token_counts:
            progress(f"compiling (first calls): {workload.name}, {tokens} tokens")
            arguments = workload.arguments(tokens)
            expected = workload.op(*arguments)
            with mode:
                actual = workload.op(*arguments)
            text = difference(actual, expected)
            if text is not None:
                mismatches.append(f"{workload.name} at {tokens} tokens: {text}")
    return Checked(mode.trace, mode.cache, mismatches)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> str | None:
    """How two results differ beyond the tolerance, in one line; None if they do not."""
    typical = _root_mean_square(expected)
    try:
        torch.testing.assert_close(
            actual, expected, rtol=RTOL[expected.dtype], atol=LARGEST_OFF * typical, check_stride=True
        )
    except AssertionError as error:
        return " ".join(str(error).split())
    off = _root_mean_square(actual.to(torch.float32) - expected.to(torch.float32))
    if off > AVERAGE_OFF * typical:
        return f"root mean square of the difference: {off:.3g} (up to {AVERAGE_OFF * typical:.3g} allowed)"
    return None


def _root_mean_square(values: torch.Tensor) -> float:
    return values.to(torch.float32).square().mean().sqrt().item() if values.numel() else 0.0


def measure(workloads: Sequence[Workload], token_counts: Sequence[int], cache: NativeCache) -> list[Measurement]:
    """Time each op at each token count, with compiled code from ``cache`` and without tracing."""
    mode = DispatchCompileMode(cache=cache)
    measurements = []
    for workload in workloads:
        for tokens in token_counts:
            progress(f"measuring: {workload.name}, {tokens} tokens")
            arguments = workload.arguments(tokens)
            measurements.append(Measurement(workload.name, tokens, *_medians(workload, arguments, mode)))
    return measurements


def _medians(workload: Workload, arguments: tuple[Any, ...], mode: DispatchCompileMode) -> tuple[float, float]:
    """Eager and compiled calls take turns, so that whatever else the machine does meets both."""
    eager: list[float] = []
    compiled: list[float] = []
    end = time.perf_counter() + SECONDS_PER_MEASUREMENT
    while len(eager) < MIN_ROUNDS or (len(eager) < MAX_ROUNDS and time.perf_counter() < end):
        eager.append(_seconds(workload, arguments, nullcontext()))
        compiled.append(_seconds(workload, arguments, mode))
    return median(eager), median(compiled)


def _seconds(workload: Workload, arguments: tuple[Any, ...], context: AbstractContextManager[Any]) -> float:
    on_cuda = arguments[0].is_cuda
    if on_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with context:
        workload.op(*arguments)
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def progress(text: str) -> None:
    """Say what is being done: on stderr, results are on stdout."""
    print(text, file=sys.stderr, flush=True)
