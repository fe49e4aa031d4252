"""Every op that Inductor computes in its own way, compiled and eager: ``python -m benchmarks numerics --ops``."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dispatch_compile import CompileConfig, CompileError, DispatchCompileMode, register_op

from .progress import Progress
from .sweep_cases import ORDER, Variant, left_out, name_of, swept_ops, variants
from .sweep_results import BITWISE, DEFAULT, Difference, Row, Sweep, difference, failure

CONFIGS = {
    DEFAULT: CompileConfig(on_failure="raise"),
    BITWISE: CompileConfig(bitwise=True, on_failure="raise"),
}
# Ops in one graph. Each has tensors of its own, so Inductor fuses none with another: every op has a loop of its own,
# but they share what a compilation costs.
BATCH = 24

_serial = itertools.count()


def run(device: str, names: Sequence[str] | None, dtypes: Sequence[str], every: int = 1, jobs: int = 1) -> Sweep:
    """Call ops compiled and eagerly, and compare.

    Args:
        names: of the ops, such as ``expm1``; None for all.
        dtypes: names in ``sweep_values.DTYPES``.
        every: make every so many-th of the calls.
        jobs: how many processes share the dtypes.
    """
    start = time.monotonic()
    progress = Progress()
    rows: list[Row] = []
    try:
        progress.expect(len(dtypes))
        progress.show(f"{len(dtypes)} dtypes")
        with ExitStack() as stack:
            mapped: Any = map
            if jobs > 1:
                pool = ProcessPoolExecutor(min(jobs, len(dtypes)), multiprocessing.get_context("spawn"))
                mapped = stack.enter_context(pool).map
            for found in mapped(partial(_rows, device, names, every), range(len(dtypes)), dtypes):
                rows += found
                progress.step()
    finally:
        progress.close()
    return Sweep.of(device, len({row.op for row in rows}), time.monotonic() - start, left_out(), rows)


def _rows(device: str, names: Sequence[str] | None, every: int, number: int, dtype: str) -> list[Row]:
    """For the ``number``-th of the dtypes, which starts with another call than the others."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    with torch.inference_mode():
        calls = [call for call in variants(names, dtype)[number % every :: every] if _runs(call, device)]
        for config in CONFIGS:
            for batch in _batches(calls, config, device):
                rows += _compared(batch, config, device)
    return rows


def op_names() -> set[str]:
    """What ``names`` may be."""
    return set(map(name_of, swept_ops()))


def _batches(calls: Sequence[Variant], config: str, device: str) -> list[Sequence[Variant]]:
    comparable = [
        call for call in calls if device == "cpu" or not call.varies or (config, call.kind) == (DEFAULT, ORDER)
    ]
    return [comparable[number : number + BATCH] for number in range(0, len(comparable), BATCH)]


def _runs(call: Variant, device: str) -> bool:
    """Whether eager has a kernel for the call."""
    try:
        call.call([tensor.to(device) for tensor in call.tensors])
    except (RuntimeError, NotImplementedError, IndexError, ValueError, TypeError):
        return False
    return True


def _compared(batch: Sequence[Variant], config: str, device: str) -> list[Row]:
    """A row for each call; where the calls cannot be compiled together, by halves."""
    inputs = [tensor.to(device, copy=True) for call in batch for tensor in call.tensors]
    try:
        found = _compiled(batch, inputs, config)
    except CompileError as error:
        if len(batch) == 1:
            return [_row(batch[0], config, failure(str(error)[:200]))]
        half = len(batch) // 2
        return _compared(batch[:half], config, device) + _compared(batch[half:], config, device)
    rows = []
    for call, actual in zip(batch, found, strict=True):
        tensors = [tensor.to(device) for tensor in call.tensors]
        rows.append(_row(call, config, difference(call, tensors, actual, call.call(tensors))))
    return rows


def _compiled(batch: Sequence[Variant], inputs: list[Tensor], config: str) -> list[list[Tensor]]:
    lengths: list[int] = []

    def calls(tensors: list[Tensor]) -> list[Tensor]:
        rest = iter(tensors)
        results = [call.call([next(rest) for _ in call.tensors]) for call in batch]
        lengths[:] = map(len, results)
        return [tensor for result in results for tensor in result]

    op = register_op(name=f"sweep_{next(_serial)}")(calls)
    mode = DispatchCompileMode(ops=[op], config=CONFIGS[config])
    try:
        with mode:
            found = iter(op.torch_op(inputs))
        if mode.cache.stats().hits != 1:
            raise RuntimeError(f"{[call.op for call in batch]} did not run compiled: {mode.cache.stats()}")
    finally:
        op.unregister()
    return [list(itertools.islice(found, length)) for length in lengths]


def _row(call: Variant, config: str, found: Difference) -> Row:
    return Row(f"{name_of(call.op)}.{call.op._overloadname}", call.text, call.dtype, config, found)
