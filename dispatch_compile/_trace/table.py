"""A trace as a table: what became of the calls of each op."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .event import TraceEvent

_NAMES = 2  # columns with text
_COUNTED = ("calls", "compiled", "eager", "aside", "specializations")


def table_of(events: Iterable[TraceEvent], *, markdown: bool, seconds: bool) -> str:
    """One row for each op and provider, in the order of their names; see :meth:`Trace.summary`."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for event in events:
        count = counts.setdefault((event.op.removesuffix(".default"), event.provider or "-"), Counter())
        count.update({"calls": 1, event.action: 1, "specializations": int(event.new)})
        count["compile ns"] += event.compile_nanoseconds
    rows = [["op", "provider", *_COUNTED]]
    rows += [[*names, *(str(count[column]) for column in _COUNTED)] for names, count in sorted(counts.items())]
    if seconds:
        rows[0].append("compile seconds")
        for row, (_, count) in zip(rows[1:], sorted(counts.items()), strict=True):
            row.append(f"{count['compile ns'] * 1e-9:.2f}")
    return _markdown(rows) if markdown else _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        names, numbers = row[:_NAMES], row[_NAMES:]
        cells = [name.ljust(width) for name, width in zip(names, widths[:_NAMES], strict=True)]
        cells += [number.rjust(width) for number, width in zip(numbers, widths[_NAMES:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *others = (f"| {' | '.join(row)} |" for row in rows)
    rule = f"|{' --- |' * _NAMES}{' ---: |' * (len(rows[0]) - _NAMES)}"
    return "\n".join([header, rule, *others])
