"""The measurement itself: every variant in a process of its own, and all in turns."""

from __future__ import annotations

import multiprocessing
import random
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ..progress import Progress
from ..results import Times, describe_machine
from . import worker
from .results import VARIANTS, CaseResult, Results, Settings, VariantResult


def run(settings: Settings, progress: Progress) -> Iterator[Results]:
    """Measure, body by body; what fails is said in the results, and the rest goes on.

    Yields:
        What was found up to then, after each body.
    """
    progress.expect(len(settings.bodies) * len(settings.tokens) * settings.rounds)
    results = Results({**describe_machine(settings.device), "vllm": metadata.version("vllm")}, settings, (), {})
    with tempfile.TemporaryDirectory(prefix="dispatch_compile_bodies_") as folder, ExitStack() as stack:
        progress.show("starting a process for each variant")
        workers = [_Worker(name, settings, Path(folder), progress, stack) for name in VARIANTS]
        for each in workers:
            each.wait_until_started()
        for body in settings.bodies:
            for each in workers:
                each.begin(body)
            cases = tuple(_measured(workers, body, tokens, settings, progress) for tokens in settings.tokens)
            compilations = {each.name: count for each in workers if (count := each.compilations()) is not None}
            results = replace(
                results,
                cases=(*results.cases, *cases),
                compilations={**results.compilations, body: compilations},
            )
            yield results


class _Worker:
    """The process of a variant, seen from here. Once something failed, it is left alone until the next body."""

    def __init__(self, name: str, settings: Settings, folder: Path, progress: Progress, stack: ExitStack) -> None:
        self.name = name
        self.result = VariantResult()
        self._body = ""
        self._folder = folder
        self._progress = progress
        self._pool = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        self._started = self._pool.submit(worker.start, name, settings.sizes, settings.device, settings.threads)

    @property
    def works(self) -> bool:
        """Whether nothing has failed."""
        return self.result.error is None

    def wait_until_started(self) -> None:
        try:
            self._started.result()
        except Exception as error:  # of whatever kind: the other variants can still be measured
            self._fail(error)

    def begin(self, body: str) -> None:
        self._body = body
        if self._started.exception() is None:
            self.result = VariantResult()
            cache = f"{self.name} {body}".replace(" ", "_")  # compilers' command lines do not like blanks
            self._ask("begin", body, self._folder / cache)

    def prepare(self, tokens: int) -> None:
        if self.works:
            self._progress.show(f"{self._body}, {tokens} tokens: {self.name}")
            self.result = VariantResult()
            prepared = self._ask("prepare", tokens, self._folder / f"{self._body}_{tokens}.pt")
            if prepared is not None:
                self.result = VariantResult(**asdict(prepared))

    def time_round(self) -> dict[str, float]:
        """Seconds by kind of time; nothing after a failure."""
        return (self._ask("time_round") or {}) if self.works else {}

    def compilations(self) -> int | None:
        return self._ask("compilations") if self.works else None

    def _ask(self, method: str, *args: Any) -> Any:
        try:
            return self._pool.submit(worker.call, method, *args).result()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        self.result = VariantResult(error=text)
        self._progress.note(f"{self._body}: {self.name}: {text}")


def _measured(workers: list[_Worker], body: str, tokens: int, settings: Settings, progress: Progress) -> CaseResult:
    for each in workers:
        each.prepare(tokens)
    progress.show(f"{body}, {tokens} tokens: timing")
    shuffle = random.Random(0).sample  # what runs before a variant may favour it
    samples: dict[str, dict[str, list[float]]] = {each.name: {} for each in workers}
    for _ in range(settings.rounds):
        for each in shuffle(workers, len(workers)):
            for kind, seconds in each.time_round().items():
                samples[each.name].setdefault(kind, []).append(seconds)
        progress.step()
    results = {}
    for each in workers:
        times = {kind: Times.of(seconds) for kind, seconds in samples[each.name].items()}
        results[each.name] = replace(each.result, times=times) if each.works else each.result
    return CaseResult(body, tokens, results)
