"""The results as a picture: a column for each body, a row for each kind of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..plot import Curve, draw_panels
from .report import title, what_is_measured
from .results import EAGER, OURS, REST, TODAY, VARIANTS, Results

# Colours that differ for the colour-blind, too (Okabe and Ito's), those of the same ways in the benchmark of the ops.
STYLES: dict[str, dict[str, Any]] = {
    EAGER: {"color": "#999999", "marker": "o"},
    TODAY: {"color": "#0072B2", "marker": "s"},
    OURS: {"color": "#D55E00", "marker": "o", "linewidth": 2.5},
    REST: {"color": "black", "linestyle": "--"},
}


def draw(results: Results, path: Path) -> None:
    """Write the picture; raises as ``draw_panels`` does."""
    panels = {
        f"{what_is_measured(kind, results.settings.device)}, µs": {
            body: _curves(results, body, kind) for body in results.bodies
        }
        for kind in results.kinds
    }
    draw_panels(panels, title(results), path)


def _curves(results: Results, body: str, kind: str) -> list[Curve]:
    cases = [case for case in results.cases if case.body == body]
    curves = []
    for variant in VARIANTS:
        points = [(case.tokens, time) for case in cases if (time := case.time(variant, kind)) is not None]
        if points:
            curves.append(Curve(variant, points, STYLES[variant]))
    return curves
