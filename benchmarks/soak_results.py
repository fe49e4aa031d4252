"""What ``soak`` found: whether anything was wrong, and by how much memory grew."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten

import torch

from .results import counted, json_text
from .tables import Table, aligned

SCHEMA = "soak 1"

MIB = 2**20
WIDTH = 100  # of a text in a table

# What may be more at the end than at the start. torch keeps some 50 objects for each name that an op ever had, and the
# text of every graph that it compiled; allocators keep what several threads freed.
RESIDENT_MIB, RESIDENT_MIB_PER_COMPILATION = 192.0, 0.02
OBJECTS, OBJECTS_PER_COMPILATION = 40_000, 40
DEVICE_MIB = 16.0


@dataclass(frozen=True)
class Memory:
    """What the process holds.

    Attributes:
        resident_mib: resident memory, MiB; None where the system has no /proc.
        objects: Python objects that garbage collection knows.
        device_mib: memory of living tensors on the GPU, MiB; None on a CPU.
    """

    resident_mib: float | None
    objects: int
    device_mib: float | None


def memory_now(device: str) -> tuple[Memory, Counter[str]]:
    """What the process holds, and how many objects of each type."""
    gc.collect()
    gc.collect()  # finalizers of the first one have made garbage
    types = Counter(f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in gc.get_objects())
    on_device = torch.cuda.memory_allocated() / MIB if device == "cuda" else None
    return Memory(_resident_mib(), types.total(), on_device), types


def _resident_mib() -> float | None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


@dataclass(frozen=True)
class Results:
    """All that a run found.

    Attributes:
        machine: what it ran on, by what a person calls it.
        backend: what compiled.
        calls: how many were made in modes, by what they were for.
        checked: how many of their results were compared with the eager ones.
        compiles, hits, fallbacks, asides: the sum over all modes; see ``CacheStats``.
        reasons: why calls did not run compiled, the commonest first.
        errors: how often which error was met.
        start, end: memory after warming up, and when all was done.
        grown: the types of which there are most objects more at the end.
    """

    machine: Mapping[str, str]
    device: str
    backend: str
    threads: int
    seconds: float
    calls: Mapping[str, int]
    checked: int
    compiles: int
    hits: int
    fallbacks: int
    asides: int
    reasons: Mapping[str, int]
    errors: Mapping[str, int]
    start: Memory
    end: Memory
    grown: Mapping[str, int]

    def problems(self) -> Iterator[str]:
        """What was wrong, a line each."""
        for text, count in self.errors.items():
            yield f"{counted(count, 'time')}: {text}"
        if not self.hits:
            yield "no call ran compiled"
        yield from self._grown_beyond(
            "resident MiB",
            self.start.resident_mib,
            self.end.resident_mib,
            RESIDENT_MIB + RESIDENT_MIB_PER_COMPILATION * self.compiles,
        )
        yield from self._grown_beyond(
            "objects", self.start.objects, self.end.objects, OBJECTS + OBJECTS_PER_COMPILATION * self.compiles
        )
        yield from self._grown_beyond("MiB on the GPU", self.start.device_mib, self.end.device_mib, DEVICE_MIB)

    def _grown_beyond(self, what: str, start: float | None, end: float | None, limit: float) -> Iterator[str]:
        if start is not None and end is not None and end - start > limit:
            yield f"{what} grew from {start:,.0f} to {end:,.0f}, by more than {limit:,.0f}"

    def to_json(self) -> str:
        return json_text(SCHEMA, {**asdict(self), "problems": list(self.problems())})


def text(results: Results) -> str:
    """For a terminal."""
    made = sum(results.calls.values())
    rows: list[tuple[str, ...]] = [
        ("", "number"),
        ("calls", f"{made:,}"),
        *((f"  {name}", f"{count:,}") for name, count in results.calls.items()),
        ("results compared with eager", f"{results.checked:,}"),
        ("compilations", f"{results.compiles:,}"),
        ("ran compiled", f"{results.hits:,}"),
        ("ran eagerly", f"{results.fallbacks:,}"),
        ("stepped aside", f"{results.asides:,}"),
        ("errors", f"{sum(results.errors.values()):,}"),
    ]
    memory: list[tuple[str, ...]] = [("", "start", "end")]
    for name in ("resident_mib", "objects", "device_mib"):
        start, end = getattr(results.start, name), getattr(results.end, name)
        if start is not None and end is not None:
            memory.append((name.replace("_mib", " MiB"), f"{start:,.0f}", f"{end:,.0f}"))
    tables = [Table(f"{results.seconds:.0f} s on {results.threads} threads, {results.device}", rows)]
    tables.append(Table("Memory", memory))
    for title, counts in (("Reasons", results.reasons), ("Objects that there are more of", results.grown)):
        if counts:
            cells = ((shorten(name, WIDTH), f"{count:,}") for name, count in counts.items())
            tables.append(Table(title, [("", "number"), *cells]))
    problems = list(results.problems())
    verdict = "Wrong:\n" + "\n".join(f"  {problem}" for problem in problems) if problems else "Nothing was wrong."
    return "\n\n".join([*map(aligned, tables), verdict])
