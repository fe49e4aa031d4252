"""How long the first call takes, in processes of their own: one that finds the cache on disk empty, and one that
finds all it needs.

A child process is ``python -m benchmarks.compile_time PEER SETTINGS``, and prints seconds by op as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from dispatch_compile import register_op

from .cases import CASES, DTYPES, Case, Inputs, Sizes
from .child import printed_by, reason
from .peers import OURS, TORCH_COMPILE, Contender, Ours, TorchCompileInMode, all_sizes_dynamic
from .progress import Progress
from .results import CompileTime, Settings

TOKENS = 8

PEERS: Mapping[str, Callable[[Case], Contender]] = {
    OURS: lambda case: Ours(OURS, case.op),
    TORCH_COMPILE: lambda case: TorchCompileInMode(TORCH_COMPILE, case.op, all_sizes_dynamic(case)),
}
STATES = ("cold", "warm")
STEPS = len(PEERS) * len(STATES)


def measure(settings: Settings, progress: Progress) -> dict[str, dict[str, CompileTime]]:
    """Seconds by op and peer; a peer whose process failed is left out, and noted."""
    times: dict[str, dict[str, CompileTime]] = {op: {} for op in settings.ops}
    for peer in PEERS:
        try:
            cold, warm = _cold_and_warm(peer, settings, progress)
        except (subprocess.SubprocessError, ValueError) as error:
            progress.note(f"compile times: {peer}: {reason(error)}")
            continue
        for op in settings.ops:
            times[op][peer] = CompileTime(cold[op], warm[op])
    return times


def _cold_and_warm(peer: str, settings: Settings, progress: Progress) -> list[dict[str, float]]:
    found = []
    with tempfile.TemporaryDirectory(prefix="dispatch_compile_bench_") as cache:
        for state in STATES:
            progress.show(f"compile times, {state}: {peer}")
            found.append(_in_child(peer, settings, Path(cache)))
            progress.step()
    return found


def _in_child(peer: str, settings: Settings, cache: Path) -> dict[str, float]:
    seconds: dict[str, float] = printed_by(__name__, [peer, json.dumps(asdict(settings))], cache)
    return seconds


def first_calls(peer: str, settings: Settings) -> dict[str, float]:
    """Seconds that the first call of each op takes in this process."""
    with torch.inference_mode():
        with _warm_up_case() as case:
            _first_call(peer, case, settings)  # takes upon it what a process pays once, as loading Inductor
        return {op: _first_call(peer, CASES[op], settings) for op in settings.ops}


@contextmanager
def _warm_up_case() -> Iterator[Case]:
    @register_op(name="bench_warm_up")
    def warm_up(x: Tensor) -> Tensor:
        return x + 1

    try:
        yield Case(warm_up, lambda make: (make.activation(),))
    finally:
        warm_up.unregister()


def _first_call(name: str, case: Case, settings: Settings) -> float:
    way = PEERS[name](case)
    arguments = case.arguments(Inputs(Sizes(TOKENS, settings.hidden, DTYPES[settings.dtype], settings.device)))
    start = time.perf_counter()
    peer = way.peer([arguments])
    with peer.context:
        peer.call(*arguments)
    if settings.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    peer, text = sys.argv[1:]
    settings = Settings(**json.loads(text))
    torch.set_num_threads(settings.threads)
    print(json.dumps(first_calls(peer, settings)))


if __name__ == "__main__":
    main()
