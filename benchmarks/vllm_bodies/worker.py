"""One variant in a process of its own, which does as it is told: prepare a case, then time it, round by round."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler_legacy import profile

from .. import timing
from ..cases import tensors
from ..peers import Peer
from ..proof import BOOKKEEPING, Broken
from .results import EAGER, GRAPH, Sizes

WARM_UP_CALLS = 5
WAKE_UP_SECONDS = 0.03
LARGEST_DIFFERENCE = 0.06  # of a norm: a step of float8 is 0.0625 to 0.125 of a value, and few values are a step off


@dataclass(frozen=True)
class Prepared:
    """What there is to say of a case before it is timed; as in ``VariantResult``."""

    first_call: float
    aten_ops: int
    difference: float | None


class Worker:
    """The variant, and the case that it is prepared for."""

    def __init__(self, variant: str, sizes: Sizes, device: str) -> None:
        from .variants import VARIANT_CLASSES  # imports vLLM

        self._name = variant
        self._sizes = sizes
        self._device = device
        self._variant = VARIANT_CLASSES[variant]()
        self._timer = timing.timer(device)
        self._body = ""
        self._peers: dict[str, tuple[Peer, int]] = {}
        self._compilations_before: int | None = None

    def begin(self, body: str, cache: Path) -> None:
        """Go on to another body, with an empty cache on disk for compiled code."""
        from . import bodies

        self._peers.clear()
        bodies.LAYERS.clear()
        gc.collect()
        torch._dynamo.reset()  # ours forgets by itself, as its code lives as long as the layers
        os.environ.update(TORCHINDUCTOR_CACHE_DIR=str(cache), TRITON_CACHE_DIR=str(cache / "triton"))
        bodies.LAYERS[body] = self._variant.layers(body)
        self._body = body
        self._op = bodies.opaque_op(body)
        self._inputs = bodies.Inputs(body, self._sizes, self._device)
        if self._variant.compilations() is not None:  # this compilation takes upon it what is paid once
            torch.compile(lambda x: x + 1)(torch.ones(2, device=self._device))
        self._compilations_before = self._variant.compilations()

    def compilations(self) -> int | None:
        """How many the body has needed; None if the variant does not compile."""
        now = self._variant.compilations()
        return None if now is None or self._compilations_before is None else now - self._compilations_before

    def prepare(self, tokens: int, expected: Path) -> Prepared:
        """Get ready for that many tokens.

        Args:
            tokens: how many.
            expected: where the eager variant writes its results, and the others find them; without it they are not
                compared.

        Raises:
            Broken: the variant does not do what it claims.
        """
        self._peers.clear()
        arguments = (*self._inputs.of(tokens), self._body)
        peer = Peer(self._name, self._op, [arguments])
        self._synchronize()
        start = time.perf_counter()
        result = self._op(*arguments)
        self._synchronize()
        first_call = round(time.perf_counter() - start, 4)
        if self._name == EAGER:
            torch.save(tensors(result), expected)
        difference = _difference(tensors(result), torch.load(expected)) if expected.exists() else None
        del result
        for _ in range(WARM_UP_CALLS):
            self._op(*arguments)
        ops = self._aten_ops(peer)
        gc.collect()
        self._peers = {"": (peer, self._timer.batch_size(peer))}
        if self._device == "cuda":
            replay = Peer(GRAPH, _captured(lambda: self._op(*arguments)).replay, [()])
            self._peers[GRAPH] = replay, self._timer.batch_size(replay)
        return Prepared(first_call, ops, difference)

    def time_round(self) -> dict[str, float]:
        """Seconds per call, by kind of time."""
        peer, count = self._peers[""]
        self._wake_up(peer)
        seconds = dict(self._timer.times(peer, count))
        if GRAPH in self._peers:
            seconds[GRAPH] = dict(self._timer.times(*self._peers[GRAPH]))[timing.DEVICE]
        return seconds

    def _wake_up(self, peer: Peer) -> None:
        """Call it for a while: this process slept while others took their turns, and its processor is cold."""
        [arguments] = peer.arguments(1)
        end = time.perf_counter() + WAKE_UP_SECONDS
        while time.perf_counter() < end:
            peer.call(*arguments)
            self._synchronize()

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _aten_ops(self, peer: Peer) -> int:
        """How many run in a call, by torch's profiler."""
        with profile() as profiled:
            peer.call(*peer.arguments(1)[0])
        ran = [event.name for event in profiled.function_events if event.name.startswith("aten::")]
        eager = sorted(self._variant.never_eager.intersection(ran))
        if eager:
            raise Broken(f"small ops ran eagerly: {', '.join(eager)}")
        return sum(name not in BOOKKEEPING for name in ran)


def _difference(results: list[Tensor], expected: list[Tensor]) -> float:
    """The largest distance, relative to the norm of what is expected."""
    distances = [
        float((one.float() - other.float()).norm() / other.float().norm())
        for one, other in zip(results, expected, strict=True)
    ]
    largest = max(distances)
    if not largest <= LARGEST_DIFFERENCE:  # not a number is too large
        raise Broken(f"the results differ from the eager ones by {distances} of their norms")
    return round(largest, 6)


def _captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


_worker: Worker | None = None  # of this process


def start(variant: str, sizes: Sizes, device: str, threads: int) -> None:
    """Make this process the worker of a variant."""
    global _worker
    os.dup2(2, 1)  # the command's output is its own; vLLM logs to stdout
    torch.set_num_threads(threads)
    torch.inference_mode().__enter__()
    gc.disable()
    _worker = Worker(variant, sizes, device)


def call(method: str, *args: Any) -> Any:
    """Call a method of this process's worker."""
    return getattr(_worker, method)(*args)
