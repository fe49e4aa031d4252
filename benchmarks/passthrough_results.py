"""What ``passthrough`` found, as JSON and as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from .results import counted, json_text, read_json, versions_text, where_text
from .tables import Table, aligned, as_markdown, microseconds

SCHEMA = "passthrough 1"


@dataclass(frozen=True)
class Quartiles:
    """Of a ratio's values in all rounds."""

    lower: float
    median: float
    upper: float

    @staticmethod
    def of(values: Sequence[float]) -> Quartiles:
        return Quartiles(*(round(value, 4) for value in quantiles(values, n=4, method="inclusive")))


@dataclass(frozen=True)
class Row:
    """One call, made in several ways in turn.

    Attributes:
        call: what is called.
        times: microseconds per call, by way: the median of the rounds.
        ratios: of the two times in a round, by ``"way / other way"``.
    """

    call: str
    times: Mapping[str, float]
    ratios: Mapping[str, Quartiles]

    @staticmethod
    def of(call: str, seconds: Mapping[str, Sequence[float]], compared: Iterable[tuple[str, str]]) -> Row:
        """From the seconds in each round, by way, and the pairs of ways whose ratios are wanted."""
        ratios = {
            f"{way} / {other}": Quartiles.of([one / two for one, two in zip(seconds[way], seconds[other], strict=True)])
            for way, other in compared
        }
        return Row(call, {way: round(median(values) * 1e6, 4) for way, values in seconds.items()}, ratios)


@dataclass(frozen=True)
class Results:
    """All that a run found.

    Attributes:
        machine: what it ran on, by what a person calls it.
        tables: rows with the same ways and ratios, by title.
    """

    machine: Mapping[str, str]
    device: str
    threads: int
    rounds: int
    tables: Mapping[str, Sequence[Row]]

    def to_json(self) -> str:
        return json_text(SCHEMA, asdict(self))


def read(path: Path) -> Results:
    """The results in a JSON file; raises as :func:`read_json` does."""
    return read_json(path, SCHEMA, _results)


def _results(data: dict[str, Any]) -> Results:
    return Results(
        data["machine"],
        data["device"],
        data["threads"],
        data["rounds"],
        {title: [_row(row) for row in rows] for title, rows in data["tables"].items()},
    )


def _row(data: dict[str, Any]) -> Row:
    return Row(data["call"], data["times"], {name: Quartiles(**each) for name, each in data["ratios"].items()})


def text(results: Results) -> str:
    """For a terminal."""
    header = [f"{name:<8}{value}" for name, value in results.machine.items()]
    header.append(f"{'run':<8}{results.rounds} rounds, {counted(results.threads, 'thread')}; {_units(results)}")
    return "\n\n".join(["\n".join(header), *(aligned(table) for table in _tables(results))])


def markdown(results: Results) -> str:
    """For a document."""
    where = where_text(results.machine, results.threads)
    versions = f"torch {results.machine['torch']}, {versions_text(results.machine)}"
    caption = f"{where}, {versions}, {results.rounds} rounds. {_units(results).capitalize()}."
    return "\n\n".join([caption, *(as_markdown(table) for table in _tables(results))])


def _units(results: Results) -> str:
    time = "host microseconds" if results.device == "cuda" else "microseconds"
    return f"{time} per call; ratios with their quartiles over the rounds"


def _tables(results: Results) -> Iterable[Table]:
    for title, rows in results.tables.items():
        header = ("", *rows[0].times, *rows[0].ratios)
        yield Table(title, [header, *(_cells(row) for row in rows)])


def _cells(row: Row) -> tuple[str, ...]:
    return row.call, *map(microseconds, row.times.values()), *map(_ratio, row.ratios.values())


def _ratio(ratio: Quartiles) -> str:
    digits = 3 if ratio.median < 2 else 1
    lower, middle, upper = (f"{value:.{digits}f}" for value in (ratio.lower, ratio.median, ratio.upper))
    return f"{middle} ({lower} to {upper})"
