"""How soon a restarted process runs compiled code: ``python -m dispatch_compile restart``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .arguments import DEVICES, available, positive
from .cases import CASES, DEFAULT_OPS
from .progress import Progress
from .restart_child import HIDDEN, LOADED, OURS, TOKENS, TORCH_COMPILE
from .results import BadResults, describe_machine, read_json, versions_text, where_text
from .tables import Table, aligned, as_markdown

SCHEMA = "restart 1"
ROUNDS = 3
TIMEOUT = 300  # seconds, for a process

COLD, WAY_LOADED = "ours, cold", "ours, loaded"

# How each runs the op. The second of a pair finds what the first left in Inductor's cache.
WAYS = {
    "torch.compile, cold": TORCH_COMPILE,
    "torch.compile, Inductor's cache": TORCH_COMPILE,
    COLD: OURS,
    "ours, Inductor's cache": OURS,
    WAY_LOADED: LOADED,
}

DESCRIPTION = f"""\
Seconds that the first call of an op takes in a process of its own ({TOKENS} tokens, hidden size {HIDDEN}, bf16), the
import of what it needs included: with Inductor's cache on disk empty, with what an earlier process left in it, and with
a file of NativeCache.save. Medians of several processes.

The table goes to stdout, progress to stderr.
"""


@dataclass(frozen=True)
class Results:
    """Seconds of the first calls, by op and way: one for each process."""

    machine: Mapping[str, str]
    device: str
    seconds: Mapping[str, Mapping[str, Sequence[float]]]

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"


def _results(data: dict[str, Any]) -> Results:
    return Results(data["machine"], data["device"], data["seconds"])


def main(argv: Sequence[str]) -> int:
    """Run the benchmark, or show the results of an earlier run.

    Returns:
        The exit status.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        if options.from_json is not None:
            found = read_json(options.from_json, SCHEMA, _results)
        else:
            found = run(available(options.device, parser), options.ops, options.rounds)
        if options.json is not None:
            options.json.write_text(found.to_json())
    except (OSError, BadResults) as error:
        parser.error(str(error))
    print(markdown(found) if options.markdown else aligned(_table(found)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dispatch_compile restart",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=DEVICES, help="default: cuda if there is one")
    parser.add_argument(
        "--ops", nargs="+", choices=CASES, default=DEFAULT_OPS, metavar="OP", help="default: %(default)s"
    )
    parser.add_argument("--rounds", type=positive, default=ROUNDS, metavar="N", help="processes; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured to FILE")
    parser.add_argument("--markdown", action="store_true", help="print a table for a document")
    parser.add_argument(
        "--from-json", type=Path, metavar="FILE", help="measure nothing, and show what an earlier run wrote with --json"
    )
    return parser


def run(device: str, ops: Iterable[str], rounds: int) -> Results:
    """Measure.

    Raises:
        RuntimeError: a process failed, or did not do what it was to be timed at.
    """
    progress = Progress()
    seconds: dict[str, dict[str, list[float]]] = {op: {name: [] for name in WAYS} for op in ops}
    progress.expect(rounds * len(seconds) * len(WAYS))
    try:
        for op in seconds:
            for _ in range(rounds):
                with tempfile.TemporaryDirectory(prefix="dispatch_compile_bench_") as folder:
                    for name, way in WAYS.items():
                        progress.show(f"{op}: {name}")
                        seconds[op][name].append(_first_call(name, op, device, Path(folder), way))
                        progress.step()
    finally:
        progress.close()
    return Results(describe_machine(device), device, seconds)


def _first_call(name: str, op: str, device: str, folder: Path, way: str) -> float:
    inductors_cache = folder / ("empty" if way == LOADED else way)  # the cold process fills it
    done = subprocess.run(
        [sys.executable, "-m", "dispatch_compile.bench.restart_child", way, op, device, str(folder / "saved")],
        env={
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(inductors_cache),
            "TRITON_CACHE_DIR": str(inductors_cache / "triton"),
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{op}, {name}: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if (found["compiles"], found["loads"]) != ((0, 1) if way == LOADED else (1, 0)):
        raise RuntimeError(f"{op}, {name}: {found['compiles']} compilations and {found['loads']} loads")
    return float(found["seconds"])


def markdown(results: Results) -> str:
    """For a document."""
    versions = f"torch {results.machine['torch']}, {versions_text(results.machine)}"
    return f"{where_text(results.machine, 1)}, {versions}.\n\n{as_markdown(_table(results))}"


def _table(results: Results) -> Table:
    rows = [("op", *WAYS, "cold / loaded")]
    for op, by_way in results.seconds.items():
        medians = {name: median(by_way[name]) for name in WAYS}
        ratio = medians[COLD] / medians[WAY_LOADED]
        rows.append((op, *map(_seconds, medians.values()), f"{ratio:.0f}"))
    return Table("Seconds until the first result", rows)


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.4f}"
