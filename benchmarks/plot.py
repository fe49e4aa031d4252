"""The results as a picture: a column for each op, a row for each kind of time."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .peers import (
    APART,
    CODE_ALONE,
    COPY,
    EAGER,
    F_RMS_NORM,
    MARK_DYNAMIC,
    MULTI_KERNEL,
    OURS,
    TORCH_COMPILE,
    TUNED,
    TUNED_MULTI_KERNEL,
    VLLM,
)
from .report import shown_peers, title, what_is_measured
from .results import Results

# Colours that differ for the colour-blind, too (Okabe and Ito's). Ours are of one colour, and thicker.
STYLES: dict[str, dict[str, Any]] = {
    EAGER: {"color": "#999999", "marker": "o"},
    TORCH_COMPILE: {"color": "#0072B2", "marker": "s"},
    MARK_DYNAMIC: {"color": "#56B4E9", "marker": "D"},
    VLLM: {"color": "#009E73", "marker": "^"},
    F_RMS_NORM: {"color": "#CC79A7", "marker": "v"},
    CODE_ALONE: {"color": "#E69F00", "marker": "x", "linestyle": ":"},
    OURS: {"color": "#D55E00", "marker": "o", "linewidth": 2.5},
    APART: {"color": "#F0E442", "marker": "h"},
    TUNED: {"color": "#D55E00", "marker": "P", "linestyle": "--"},
    MULTI_KERNEL: {"color": "#D55E00", "marker": "*", "linestyle": "-."},
    TUNED_MULTI_KERNEL: {"color": "#D55E00", "marker": "d", "linestyle": ":"},
    COPY: {"color": "black", "linestyle": "--"},
}
LABELS = {
    EAGER: "eager op",
    OURS: "ours: the op in DispatchCompileMode",
    COPY: "limit: a copy of as many bytes",
    TORCH_COMPILE: "torch.compile(dynamic=True) in a mode",
    MARK_DYNAMIC: "torch.compile and mark_dynamic in a mode",
    APART: "ours: the ops it is composed of, one by one",
    CODE_ALONE: "ours without interception: the compiled code alone",
}
PANEL, LEGEND_ENTRY, MARGIN = (3.6, 3.4), 3.6, 1.2  # inches
FEWEST_COLUMNS = 2  # title and legend need the width
DPI = 130


class NoMatplotlib(Exception):
    """There is nothing to draw with."""


def check_drawable() -> None:
    """See that there is something to draw with, before anything is measured.

    Raises:
        NoMatplotlib: there is not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise NoMatplotlib('a plot needs matplotlib: pip install "dispatch-compile[bench]"')


@dataclass(frozen=True)
class Curve:
    """Microseconds by number of tokens, and how they are drawn."""

    label: str
    points: Sequence[tuple[int, float]]
    style: Mapping[str, Any]


# Curves by what is measured, and by what it is measured of: a row, and a column of the picture.
Panels = Mapping[str, Mapping[str, Sequence[Curve]]]


def draw(results: Results, path: Path) -> None:
    """Write the picture; raises as :func:`draw_panels` does."""
    ops = list(dict.fromkeys(case.op for case in results.cases))
    device = results.settings.device
    panels = {
        f"{what_is_measured(kind, device)}, µs": {op: _curves(results, op, kind) for op in ops}
        for kind in results.kinds
    }
    draw_panels(panels, title(results), path)


def draw_panels(panels: Panels, subject: str, path: Path) -> None:
    """Write a picture of these panels; its format is that of the file name's ending.

    Raises:
        NoMatplotlib: matplotlib is not installed.
        OSError, ValueError: the file cannot be written, or no format has such an ending.
    """
    check_drawable()
    from matplotlib.figure import Figure  # takes a second

    columns = list(next(iter(panels.values())))
    width, height = max(FEWEST_COLUMNS, len(columns)) * PANEL[0], len(panels) * PANEL[1]
    figure = Figure(figsize=(width, height + MARGIN), layout="constrained")
    grid = figure.subplots(len(panels), len(columns), squeeze=False, sharex=True, sharey="row")
    for row, (what, of_columns) in zip(grid, panels.items(), strict=True):
        row[0].set_ylabel(what)
        for panel, curves in zip(row, of_columns.values(), strict=True):
            _draw_panel(panel, curves)
    for panel, column in zip(grid[0], columns, strict=True):
        panel.set_title(column, fontsize="small" if len(column) > 30 else None)
    for panel in grid[-1]:
        panel.set_xlabel("tokens")
    figure.suptitle(f"Lower is better. {subject}", fontsize="medium")
    handles = {
        label: line for panel in grid.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=int(width // LEGEND_ENTRY),
        frameon=False,
        fontsize="small",
    )
    figure.savefig(path, dpi=DPI)


def _curves(results: Results, op: str, kind: str) -> list[Curve]:
    cases = [case for case in results.cases if case.op == op]
    curves = []
    for peer in shown_peers(cases, kind, results.settings.device):
        points = [(case.tokens, time) for case in cases if (time := case.time(peer, kind)) is not None]
        curves.append(Curve(LABELS.get(peer, peer), points, STYLES[peer]))
    return curves


def _draw_panel(panel: Any, curves: Sequence[Curve]) -> None:
    for curve in curves:
        panel.plot(*zip(*curve.points, strict=True), label=curve.label, markersize=5, **curve.style)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    tokens = sorted({tokens for curve in curves for tokens, _ in curve.points})
    panel.set_xticks(tokens, labels=map(str, tokens), fontsize="small")
    panel.minorticks_off()
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(alpha=0.3)
