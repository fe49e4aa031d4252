"""How soon a restarted process runs compiled code: ``python -m benchmarks restart``."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from . import restart_child
from .arguments import add_results_arguments, command_parser, measured_or_read, positive
from .cases import CASES, DEFAULT_OPS
from .child import printed_by, reason
from .progress import Progress
from .restart_child import HIDDEN, LOADED, OURS, TOKENS, TORCH_COMPILE
from .results import describe_machine, json_text, read_json, versions_text, where_text
from .tables import Table, aligned, as_markdown

SCHEMA = "restart 1"
ROUNDS = 3

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
        return json_text(SCHEMA, asdict(self))


def read(path: Path) -> Results:
    """The results in a JSON file; raises as ``read_json`` does."""
    return read_json(path, SCHEMA, lambda data: Results(data["machine"], data["device"], data["seconds"]))


def main(argv: Sequence[str]) -> int:
    """Run the benchmark, or show the results of an earlier run.

    Returns:
        The exit status.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    found = measured_or_read(parser, options, read, lambda device: run(device, options.ops, options.rounds))
    print(markdown(found) if options.markdown else aligned(_table(found)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("restart", DESCRIPTION)
    parser.add_argument(
        "--ops", nargs="+", choices=CASES, default=DEFAULT_OPS, metavar="OP", help="default: %(default)s"
    )
    parser.add_argument("--rounds", type=positive, default=ROUNDS, metavar="N", help="processes; default: %(default)s")
    add_results_arguments(parser)
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
    try:
        found = printed_by(restart_child.__name__, [way, op, device, str(folder / "saved")], inductors_cache)
    except (subprocess.SubprocessError, ValueError) as error:
        raise RuntimeError(f"{op}, {name}: {reason(error)}") from error
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
