"""The results as a picture: a column for each op, a row for each kind of time."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .peers import (
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


def draw(results: Results, path: Path) -> None:
    """Write the picture; its format is that of the file name's ending.

    Raises:
        NoMatplotlib: matplotlib is not installed.
        OSError, ValueError: the file cannot be written, or no format has such an ending.
    """
    check_drawable()
    from matplotlib.figure import Figure  # takes a second

    ops = list(dict.fromkeys(case.op for case in results.cases))
    kinds = results.kinds
    width, height = max(FEWEST_COLUMNS, len(ops)) * PANEL[0], len(kinds) * PANEL[1]
    figure = Figure(figsize=(width, height + MARGIN), layout="constrained")
    panels = figure.subplots(len(kinds), len(ops), squeeze=False, sharex=True, sharey="row")
    for row, kind in zip(panels, kinds, strict=True):
        what = what_is_measured(kind, results.settings.device)
        row[0].set_ylabel(f"{what}, µs")
        for panel, op in zip(row, ops, strict=True):
            _draw_panel(panel, results, op, kind)
    for panel, op in zip(panels[0], ops, strict=True):
        panel.set_title(op)
    for panel in panels[-1]:
        panel.set_xlabel("tokens")
    figure.suptitle(f"Lower is better. {title(results)}", fontsize="medium")
    handles = {
        label: line for panel in panels.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    columns = int(width // LEGEND_ENTRY)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize="small"
    )
    figure.savefig(path, dpi=DPI)


def _draw_panel(panel: Any, results: Results, op: str, kind: str) -> None:
    cases = [case for case in results.cases if case.op == op]
    for peer in shown_peers(cases, kind, results.settings.device):
        points = [(case.tokens, time) for case in cases if (time := case.time(peer, kind)) is not None]
        panel.plot(*zip(*points, strict=True), label=LABELS.get(peer, peer), markersize=5, **STYLES[peer])
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    tokens = [case.tokens for case in cases]
    panel.set_xticks(tokens, labels=map(str, tokens), fontsize="small")
    panel.minorticks_off()
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(alpha=0.3)
