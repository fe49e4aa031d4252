"""What a run of the benchmark found, and its form as JSON."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

R = TypeVar("R")

SCHEMA = 1
_NUMBERS = re.compile(r"\[[\d.,\s]+\]")  # a list of them is easier to read on one line


class BadResults(ValueError):
    """A file that holds no results of this benchmark."""


@dataclass(frozen=True)
class Settings:
    """What was asked for."""

    device: str
    ops: tuple[str, ...]
    tokens: tuple[int, ...]
    hidden: int
    dtype: str
    threads: int
    compile_times: bool


@dataclass(frozen=True)
class Times:
    """Microseconds per call: the median, and the rounds that it is of."""

    median: float
    rounds: tuple[float, ...]

    @staticmethod
    def of(seconds: list[float]) -> Times:
        rounds = tuple(round(each * 1e6, 4) for each in seconds)
        return Times(median(rounds), rounds)


@dataclass(frozen=True)
class PeerResult:
    """One way to run the op.

    Attributes:
        times: by kind, ``"host"`` or ``"device"``; empty after an error.
        peak_bytes: how much more memory the device held during a call than before; None on a CPU.
        error: why it was not timed.
    """

    times: Mapping[str, Times] = field(default_factory=dict)
    peak_bytes: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class CaseResult:
    """An op at a number of tokens; ``bytes_moved`` is the least that any way to run it must move."""

    op: str
    tokens: int
    bytes_moved: int
    peers: Mapping[str, PeerResult]

    def time(self, peer: str, kind: str) -> float | None:
        """The median in microseconds; None if the peer was not timed."""
        result = self.peers.get(peer)
        times = result.times.get(kind) if result is not None else None
        return None if times is None else times.median


@dataclass(frozen=True)
class CompileTime:
    """Seconds until the first result, with an empty cache on disk and with one that has all."""

    cold: float
    warm: float


@dataclass(frozen=True)
class Results:
    """All that a run found.

    Attributes:
        machine: what it ran on, by what a person calls it.
        cases: in the order of the run.
        compilations: how many each peer needed for all token counts, by op and peer.
        compile_times: by op and peer.
    """

    machine: Mapping[str, str]
    settings: Settings
    cases: tuple[CaseResult, ...]
    compilations: Mapping[str, Mapping[str, int]]
    compile_times: Mapping[str, Mapping[str, CompileTime]]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of time that were measured."""
        return tuple(dict.fromkeys(kind for case in self.cases for peer in case.peers.values() for kind in peer.times))

    def to_json(self) -> str:
        return json_text(SCHEMA, asdict(self))

    def only(self, ops: tuple[str, ...] | None, tokens: tuple[int, ...] | None) -> Results:
        """The part on these ops and token counts; None stands for all."""
        kept = tuple(
            case for case in self.cases if (ops is None or case.op in ops) and (tokens is None or case.tokens in tokens)
        )
        if not kept:
            raise BadResults(f"these results have nothing on ops {ops} at {tokens} tokens")
        names = {case.op for case in kept}
        return Results(
            self.machine,
            self.settings,
            kept,
            {op: counts for op, counts in self.compilations.items() if op in names},
            {op: times for op, times in self.compile_times.items() if op in names},
        )


def json_text(schema: int | str, results: dict[str, Any]) -> str:
    """What :func:`read_json` reads."""
    text = json.dumps({"schema": schema, **results}, indent=1)
    return _NUMBERS.sub(lambda match: " ".join(match[0].split()), text) + "\n"


def read(path: Path) -> Results:
    """The results in a JSON file; raises as :func:`read_json` does."""
    return read_json(path, SCHEMA, _results)


def read_json(path: Path, schema: int | str, build: Callable[[Any], R]) -> R:
    """What ``build`` makes of a JSON object with that ``"schema"``.

    Raises:
        OSError: the file cannot be read.
        BadResults: it holds something else, or results of another version.
    """
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise BadResults(f"{path} is no JSON file: {error}") from None
    if not isinstance(data, dict) or data.get("schema") != schema:
        raise BadResults(f"{path} holds no results of this benchmark with schema {schema}")
    try:
        return build(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadResults(f"{path} is not complete: {type(error).__name__}: {error}") from None


def _results(data: dict[str, Any]) -> Results:
    given = data["settings"]
    settings = Settings(**{**given, "ops": tuple(given["ops"]), "tokens": tuple(given["tokens"])})
    return Results(
        data["machine"],
        settings,
        tuple(
            CaseResult(
                case["op"],
                case["tokens"],
                case["bytes_moved"],
                {name: _peer_result(peer) for name, peer in case["peers"].items()},
            )
            for case in data["cases"]
        ),
        data["compilations"],
        {op: {peer: CompileTime(**each) for peer, each in by.items()} for op, by in data["compile_times"].items()},
    )


def _peer_result(data: dict[str, Any]) -> PeerResult:
    times = {kind: Times(each["median"], tuple(each["rounds"])) for kind, each in data["times"].items()}
    return PeerResult(times, data["peak_bytes"], data["error"])


def describe_machine(device: str) -> dict[str, str]:
    """What the benchmark runs on."""
    machine = {"cpu": f"{_cpu_model()}, {os.cpu_count()} cores"}
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
        machine["cuda"] = str(torch.version.cuda)
    machine["torch"] = torch.__version__
    with suppress(metadata.PackageNotFoundError):  # torch for CPUs comes without it
        machine["triton"] = metadata.version("triton")
    machine["python"] = platform.python_version()
    return machine


def where_text(machine: Mapping[str, str], threads: int) -> str:
    """The device that calls ran on."""
    return machine.get("gpu") or f"{machine['cpu'].partition(',')[0]}, {counted(threads, 'thread')}"


def versions_text(machine: Mapping[str, str]) -> str:
    """The software beside torch."""
    return ", ".join(f"{name} {machine[name]}" for name in ("cuda", "triton", "python") if name in machine)


def counted(count: int, noun: str) -> str:
    """A number of things, from one up."""
    return f"{count} {noun}{'s' if count > 1 else ''}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
