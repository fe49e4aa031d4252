"""An hour's worth of mixed calls in a few minutes: ``python -m benchmarks soak``."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from dispatch_compile import CompileConfig, DispatchCompileWarning, counters

from . import soak_results as results
from .arguments import available, command_parser, positive
from .progress import Progress
from .results import describe_machine
from .soak_calls import Engines, Worker, activities
from .soak_results import Results, memory_now

SECONDS, THREADS = 120, 8
WARM_UP = 1 / 10  # of the time, on all threads, before memory is measured for the first time
SECONDS_TO_STOP = 300.0  # what is being compiled is compiled to its end
SHOWN = 12  # reasons, and types of objects

DESCRIPTION = """\
Many threads call IR ops in many ways at the same time, for as long as is asked: the ops that ship, ops in the bodies
of others, ops that come and go, ops that fail, arguments to step aside for, compilation in the background, caches that
drop code and caches that are cleared, traces, and, on a CPU, children that are forked. One result in 20 is compared
with the eager one.

The exit status is 1 if anything was wrong, or if memory grew beyond what torch keeps.
"""


def main(argv: Sequence[str]) -> int:
    """Run it.

    Returns:
        The exit status.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    device = available(options.device, parser)
    try:
        CompileConfig(backend=options.backend)
    except ValueError as error:
        parser.error(f"--backend: {error}")
    found = run(device, options.backend, options.threads, options.seconds)
    print(results.text(found))
    if options.json is not None:
        try:
            options.json.write_text(found.to_json())
        except OSError as error:
            parser.error(str(error))
    return 1 if any(found.problems()) else 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("soak", DESCRIPTION)
    parser.add_argument("--seconds", type=positive, default=SECONDS, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=positive, default=THREADS, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--backend", default="inductor", metavar="NAME", help="what compiles, of torch.compile's (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to FILE")
    return parser


def run(device: str, backend: str, threads: int, seconds: float) -> Results:
    """Soak for so many seconds, after warming up.

    Each thread's ops run on that thread alone: OpenMP's own threads would not survive a fork.
    """
    torch.set_num_threads(1)
    progress = Progress()
    engines = Engines(device, backend)
    workers = [Worker(number, engines) for number in range(threads)]
    try:
        with _quiet():
            _warm_up(engines, workers, seconds * WARM_UP, progress)
            return _measured(engines, workers, seconds, progress)
    finally:
        progress.close()
        engines.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """What is to fail need not be warned of."""
    log = logging.getLogger("dispatch_compile")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DispatchCompileWarning)
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks in a process with threads
            yield
    finally:
        log.setLevel(level)


def _warm_up(engines: Engines, workers: Sequence[Worker], seconds: float, progress: Progress) -> None:
    progress.expect(len(engines.calls))
    with engines.plain:
        for prepared in engines.calls:
            progress.show(f"compiling (first calls): {prepared.op.__name__}")
            prepared.op(*prepared.arguments)
            progress.step()
    for name in activities(engines.device):
        workers[0].do(name)
    _work(workers, seconds, progress, "warming up")


def _measured(engines: Engines, workers: Sequence[Worker], seconds: float, progress: Progress) -> Results:
    engines.background.cache.wait()
    start, types = memory_now(engines.device)
    before = counters()
    for worker in workers:
        worker.calls.clear()
        worker.checked = 0
    began = time.monotonic()
    _work(workers, seconds, progress, "soaking")
    took = time.monotonic() - began
    engines.background.cache.wait()
    end, types_at_end = memory_now(engines.device)
    counted = {kind: counts - before[kind] for kind, counts in counters().items()}
    return Results(
        machine=describe_machine(engines.device),
        device=engines.device,
        backend=engines.backend,
        threads=len(workers),
        seconds=round(took, 1),
        calls=_most(sum((worker.calls for worker in workers), Counter())),
        checked=sum(worker.checked for worker in workers),
        compiles=counted["compiles"].total(),
        hits=counted["hits"].total(),
        fallbacks=counted["fallbacks"].total(),
        asides=counted["asides"].total(),
        reasons=_most(counted["reasons"], SHOWN),
        errors=_most(sum((worker.errors for worker in workers), Counter())),
        start=start,
        end=end,
        grown=_most(types_at_end - types, SHOWN),
    )


def _most(counts: Counter[str], number: int | None = None) -> Mapping[str, int]:
    return dict(counts.most_common(number))


def _work(workers: Sequence[Worker], seconds: float, progress: Progress, what: str) -> None:
    """All workers at once, on threads of their own; if one hangs, the process ends, and says where."""
    assert sys.__stderr__ is not None
    faulthandler.dump_traceback_later(seconds + SECONDS_TO_STOP, exit=True, file=sys.__stderr__)
    stop = threading.Event()
    progress.expect(int(seconds))
    progress.show(what)
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(len(workers), thread_name_prefix="soak") as pool:
        working = [pool.submit(worker.run, stop) for worker in workers]
        for _ in range(int(seconds)):
            time.sleep(1)
            progress.step()
        time.sleep(max(0.0, end - time.monotonic()))
        stop.set()
        for each in working:
            each.result()
    faulthandler.cancel_dump_traceback_later()
