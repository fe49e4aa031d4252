"""Tables of results, aligned for a terminal or as Markdown for a document, and how their numbers are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """A title, and rows of cells, the first of which is the header."""

    title: str
    rows: list[tuple[str, ...]]


def aligned(table: Table) -> str:
    """For a terminal."""
    widths = [max(map(len, column)) for column in zip(*table.rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table.rows
    ]
    return "\n".join([table.title, *lines])


def as_markdown(table: Table) -> str:
    """For a document."""
    header, *rows = table.rows
    alignment = ["---", *("---:" for _ in header[1:])]
    lines: Sequence[Sequence[str]] = [header, alignment, *rows]
    return "\n".join([f"{table.title}:", "", *(f"| {' | '.join(line)} |" for line in lines)])


def microseconds(value: float) -> str:
    """Three digits, or all that are in front of the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
