"""The benchmark itself: every peer, on every op, at every number of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dispatch_compile import IrOp, register_op

from . import compile_time, timing
from .cases import CASES, DTYPES, Case, Inputs, Sizes, bytes_moved
from .peers import Arguments, Contender, Peer, contenders
from .progress import Progress
from .proof import check_compiled, check_result
from .results import CaseResult, CompileTime, PeerResult, Results, Settings, Times, describe_machine

WARM_UP_CALLS = 5

# How many times a GPU's L2 cache the inputs of successive calls fill, so that each is read from memory. Small inputs
# stay in the cache, as they do in a model, whose layers have just written them.
CACHES_FILLED = 2
FEWEST_INPUTS, MOST_INPUTS = 2, 32


def run(settings: Settings, with_vllm: bool, progress: Progress) -> Results:
    """Measure; what fails is said in the results, and the rest goes on."""
    progress.expect(len(settings.ops) * len(settings.tokens) * timing.ROUNDS)
    times: dict[str, dict[str, CompileTime]] = {}
    if settings.compile_times:
        progress.expect(compile_time.STEPS)
        times = compile_time.measure(settings, progress)
    cases: list[CaseResult] = []
    compilations = {}
    with torch.inference_mode():
        for name in settings.ops:
            with unwatched(CASES[name]) as eager:
                ways = contenders(CASES[name], eager.torch_op, settings.device, with_vllm)
                for tokens in settings.tokens:
                    cases.append(_measure_case(CASES[name], tokens, settings, ways, eager.torch_op, progress))
            counts = {way.name: way.compilations() for way in ways}
            compilations[name] = {way: count for way, count in counts.items() if count is not None}
    return Results(describe_machine(settings.device), settings, tuple(cases), compilations, times)


@contextmanager
def unwatched(case: Case) -> Iterator[IrOp]:
    """A case's op under another name: while a mode that selects an op exists, its calls outside are dearer, too."""
    twin = register_op(name=f"{case.op.name}_eager", activations=case.op.activations)(case.plain)
    try:
        yield twin
    finally:
        twin.unregister()


def _measure_case(
    case: Case,
    tokens: int,
    settings: Settings,
    ways: Sequence[Contender],
    eager: Callable[..., Any],
    progress: Progress,
) -> CaseResult:
    what = f"{case.op.name}, {tokens} tokens"
    progress.show(what)
    make = Inputs(Sizes(tokens, settings.hidden, DTYPES[settings.dtype], settings.device))
    rotation = [case.arguments(make)]
    expected = eager(*rotation[0])
    moved = bytes_moved(rotation[0], expected)
    rotation += [case.arguments(make) for _ in range(_inputs_needed(moved, settings.device) - 1)]

    ready: list[Peer] = []
    results: dict[str, PeerResult] = {}
    for way in (way for way in ways if way.fewest_tokens <= tokens):
        progress.show(f"{what}: {way.name}")
        try:
            peer, results[way.name] = _prepared(way, case, rotation, expected, settings)
        except Exception as error:  # of whatever kind: the other peers can still be measured
            results[way.name] = PeerResult(error=" ".join(f"{type(error).__name__}: {error}".split())[:500])
            progress.note(f"{what}: {way.name}: {results[way.name].error}")
        else:
            ready.append(peer)
    del expected

    progress.show(f"{what}: timing")
    samples = timing.measure(ready, timing.timer(settings.device), timing.ROUNDS, each_round=progress.step)
    for name, by_kind in samples.items():
        times = {kind: Times.of(seconds) for kind, seconds in by_kind.items()}
        results[name] = PeerResult(times, results[name].peak_bytes)
    return CaseResult(case.op.name, tokens, moved, results)


def _inputs_needed(moved: int, device: str) -> int:
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties().L2_cache_size
    return int(max(FEWEST_INPUTS, min(MOST_INPUTS, math.ceil(CACHES_FILLED * cache / moved))))


def _prepared(
    way: Contender, case: Case, rotation: Sequence[Arguments], expected: Any, settings: Settings
) -> tuple[Peer, PeerResult]:
    """A peer that has proved itself and is warm, and the memory that it needs."""
    peer = way.peer(rotation)
    with peer.context:
        result = peer.call(*peer.arguments(1)[0])
        if peer.comparable:
            check_result(result, expected, between=DTYPES[settings.dtype] if case.parts else None)
        del result
        for arguments in peer.arguments(max(WARM_UP_CALLS, len(rotation))):
            peer.call(*arguments)
    if peer.compiled:
        check_compiled(peer)
    return peer, PeerResult(peak_bytes=_peak_bytes(peer) if settings.device == "cuda" else None)


def _peak_bytes(peer: Peer) -> int:
    [arguments] = peer.arguments(1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with peer.context:
        peer.call(*arguments)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
