"""Host and device time per call, in rounds that all peers take turns in: whatever else the machine does meets all."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from .peers import Arguments, Peer

ROUNDS = 15

HOST = "host"
DEVICE = "device"

# A batch is long enough for the clock. On a GPU its kernels must fit in the launch queue (1024 of them), or the host
# waits for the device.
CPU_BATCH_SECONDS, CPU_BATCH_CALLS = 0.02, (1, 5000)
CUDA_BATCH_SECONDS, CUDA_BATCH_CALLS = 0.005, (10, 50)

ESTIMATE_CALLS = 3
CYCLES_PER_SECOND = 2e9  # of a GPU that sleeps: at least what any has
SLEEP_FACTOR = 1.5
LONGEST_SLEEP = 0.5

# Seconds per call, one for each round, by kind of time.
Samples = dict[str, list[float]]


class Timer(Protocol):
    """How a peer's calls are timed."""

    def batch_size(self, peer: Peer) -> int:
        """How many calls to time at once."""

    def times(self, peer: Peer, count: int) -> Iterator[tuple[str, float]]:
        """Kinds of time, and seconds per call."""


def measure(peers: Sequence[Peer], timer: Timer, rounds: int, each_round: Callable[[], None]) -> dict[str, Samples]:
    """Time warm peers.

    Returns:
        Samples by the peer's name.
    """
    counts = {peer.name: timer.batch_size(peer) for peer in peers}
    samples: dict[str, Samples] = {peer.name: {} for peer in peers}
    shuffle = random.Random(0).sample  # what runs before a peer may favour it
    with _no_garbage_collection():
        for _ in range(rounds):
            for peer in shuffle(peers, len(peers)):
                for kind, seconds in timer.times(peer, counts[peer.name]):
                    samples[peer.name].setdefault(kind, []).append(seconds)
            each_round()
    return samples


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def timer(device: str) -> Timer:
    """Host times, and device times where there is a device."""
    return _CudaTimer() if device == "cuda" else _CpuTimer()


class HostTimer:
    """Host times of small batches, for peers that are to be compared closely.

    All peers make as many calls, so that what the first ones of a batch cost weighs alike. On a GPU their kernels must
    fit in the launch queue.
    """

    def __init__(self, device: str, calls: int) -> None:
        self._on_cuda = device == "cuda"
        self._calls = calls

    def batch_size(self, peer: Peer) -> int:
        return self._calls

    def times(self, peer: Peer, count: int) -> Iterator[tuple[str, float]]:
        if self._on_cuda:
            torch.cuda.synchronize()
        yield HOST, _issue(peer, count)


class _CpuTimer:
    def batch_size(self, peer: Peer) -> int:
        return _clamped(CPU_BATCH_SECONDS / _issue(peer, ESTIMATE_CALLS), CPU_BATCH_CALLS)

    def times(self, peer: Peer, count: int) -> Iterator[tuple[str, float]]:
        yield HOST, _issue(peer, count)


class _CudaTimer:
    def batch_size(self, peer: Peer) -> int:
        torch.cuda.synchronize()
        start = time.perf_counter()
        _issue(peer, ESTIMATE_CALLS)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / ESTIMATE_CALLS
        return _clamped(CUDA_BATCH_SECONDS / seconds, CUDA_BATCH_CALLS)

    def times(self, peer: Peer, count: int) -> Iterator[tuple[str, float]]:
        torch.cuda.synchronize()
        host = _issue(peer, count)
        torch.cuda.synchronize()
        yield HOST, host
        yield DEVICE, self._on_device(peer, count, sleep=host * count * SLEEP_FACTOR)

    def _on_device(self, peer: Peer, count: int, sleep: float) -> float:
        """The calls wait in the queue until all are there, so that they run back to back however slow the host is."""
        arguments = peer.arguments(count)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with peer.context:
            while True:
                torch.cuda._sleep(int(sleep * CYCLES_PER_SECOND))
                start.record()
                _call_all(peer.call, arguments)
                end.record()
                all_waited = not start.query()
                torch.cuda.synchronize()
                if all_waited or sleep > LONGEST_SLEEP:
                    return float(start.elapsed_time(end)) * 1e-3 / count
                sleep *= 2
                arguments = peer.arguments(count)


def _issue(peer: Peer, count: int) -> float:
    """Host seconds per call, after one call that is not counted."""
    first, *batch = peer.arguments(count + 1)
    with peer.context:
        peer.call(*first)
        start = time.perf_counter()
        _call_all(peer.call, batch)
        return (time.perf_counter() - start) / count


def _call_all(call: Callable[..., Any], batch: Sequence[Arguments]) -> None:
    for arguments in batch:
        call(*arguments)


def _clamped(value: float, limits: tuple[int, int]) -> int:
    smallest, largest = limits
    return max(smallest, min(largest, int(value)))
