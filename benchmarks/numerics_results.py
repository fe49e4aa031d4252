"""What ``numerics`` found, as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .cases import Inputs, RoughInputs
from .peers import EAGER
from .results import json_text, read_json, versions_text, where_text
from .tables import Table, aligned, as_markdown
from .timing import DEVICE, HOST
from .ulps import Distance

SCHEMA = "numerics 1"
DEFAULT, BITWISE = "default", "bitwise"
KINDS_OF_INPUTS = {"unit": Inputs, "rough": RoughInputs}


@dataclass(frozen=True)
class Row:
    """An op in a dtype.

    Attributes:
        distances: from eager, by configuration and kind of inputs, over all token counts.
        times: microseconds per call at the largest token count, by kind of time, and then eager or a configuration.
    """

    op: str
    dtype: str
    distances: Mapping[str, Mapping[str, Distance]]
    times: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Results:
    """All that a run found.

    Attributes:
        machine: what it ran on, by what a person calls it.
        threads: of the CPU.
    """

    machine: Mapping[str, str]
    device: str
    threads: int
    tokens: tuple[int, ...]
    hidden: int
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        return json_text(SCHEMA, asdict(self))


def read(path: Path) -> Results:
    """The results in a JSON file; raises as :func:`read_json` does."""
    return read_json(path, SCHEMA, _results)


def _results(data: dict[str, Any]) -> Results:
    rows = tuple(map(_row, data["rows"]))
    return Results(data["machine"], data["device"], data["threads"], tuple(data["tokens"]), data["hidden"], rows)


def _row(data: dict[str, Any]) -> Row:
    distances = {
        config: {kind: Distance(**distance) for kind, distance in by_kind.items()}
        for config, by_kind in data["distances"].items()
    }
    return Row(data["op"], data["dtype"], distances, data["times"])


def text(results: Results) -> str:
    """For a terminal."""
    header = [f"{name:<8}{value}" for name, value in results.machine.items()]
    return "\n\n".join(["\n".join(header), aligned(_table(results))])


def markdown(results: Results) -> str:
    """For a document."""
    where = where_text(results.machine, results.threads)
    versions = f"torch {results.machine['torch']}, {versions_text(results.machine)}"
    return f"{where}, {versions}.\n\n{as_markdown(_table(results))}"


def _table(results: Results) -> Table:
    """A row for each op and dtype; a column for each configuration and kind of inputs, and for what the bits cost."""
    columns = [(config, kind) for config in (DEFAULT, BITWISE) for kind in KINDS_OF_INPUTS]
    times = {"": HOST} if results.device == "cpu" else {", host": HOST, ", device": DEVICE}
    ratios = [(label, kind, other) for label, kind in times.items() for other in (EAGER, DEFAULT)]
    rows = [
        (
            "op",
            "dtype",
            *(f"{config}, {kind}" for config, kind in columns),
            *(f"time of {BITWISE} / {other}{label}" for label, _, other in ratios),
        )
    ]
    for row in results.rows:
        cells = (_distance(row.distances[config][kind]) for config, kind in columns)
        costs = (f"{row.times[kind][BITWISE] / row.times[kind][other]:.2f}" for _, kind, other in ratios)
        rows.append((row.op, row.dtype, *cells, *costs))
    tokens = " and ".join(map(str, results.tokens))
    title = (
        f"Elements with other bits than in eager, and the greatest difference in ULPs, at {tokens} tokens of "
        f"{results.hidden}; times at {results.tokens[-1]} tokens"
    )
    return Table(title, rows)


def _distance(distance: Distance) -> str:
    if not distance.different:
        return "equal"
    share = distance.different / distance.elements
    ulps = "NaN for a number" if math.isinf(distance.ulps) else f"{distance.ulps:.0f}"
    return f"{share:.2g}".replace("e-0", "e-") + f", {ulps}"
