"""The benchmark figures in README.md and docs/ are those in ``benchmarks/figures/*.json``.

They stand there between ``<!-- COMMAND:NAME ARGUMENTS -->`` and ``<!-- /COMMAND -->``, as printed by
``python -m benchmarks COMMAND --from-json benchmarks/figures/NAME.json --markdown ARGUMENTS``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.__main__ import main

pytestmark = pytest.mark.run_once

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = "ops|passthrough|restart|numerics|vllm-bodies"
BLOCK = re.compile(rf"^<!-- ({COMMANDS}):(\w+)(.*?) -->\n(.*?)^<!-- /\1 -->$", re.MULTILINE | re.DOTALL)
MEASURED = [
    ("ops", "cpu"),
    ("ops", "cpu_small"),
    ("ops", "h100"),
    ("ops", "h100_tuning"),
    ("ops", "h200_compositions"),
    ("passthrough", "passthrough_cpu"),
    ("restart", "restart_cpu"),
    ("passthrough", "passthrough_h100"),
    ("vllm-bodies", "vllm_bodies_h100"),
    ("numerics", "numerics_cpu"),
    ("numerics", "numerics_h200"),
    ("numerics", "sweep_cpu"),
    ("numerics", "sweep_h200"),
]
DRAWN = {"ops": "README.md", "vllm-bodies": "docs/vllm_bodies.md"}  # and where the pictures are shown
DRAWN_ELSEWHERE = {"h200_compositions": "docs/fusion.md"}


def blocks() -> list[tuple[str, str, str, str]]:
    """Command, name, arguments and text of each block."""
    return [match.groups() for page in PAGES for match in BLOCK.finditer(page.read_text())]


def test_every_block_is_known_and_every_measurement_is_shown():
    assert {(command, name) for command, name, _, _ in blocks()} == set(MEASURED)


@pytest.mark.parametrize(("command", "name"), MEASURED)
def test_figures_are_those_measured(command, name, capsys):
    path = ROOT / "benchmarks" / "figures" / f"{name}.json"
    assert path.exists(), f"write it: python -m benchmarks {command} --json benchmarks/figures/{name}.json"
    for arguments, text in [block[2:] for block in blocks() if block[:2] == (command, name)]:
        assert main([command, "--from-json", str(path), "--markdown", *arguments.split()]) == 0
        assert text.strip() == capsys.readouterr().out.strip(), (
            f"the block {command}:{name} is not up to date: put there what this prints:\n"
            f"python -m benchmarks {command} --from-json benchmarks/figures/{name}.json --markdown{arguments}"
        )


@pytest.mark.parametrize(("command", "name"), [(command, name) for command, name in MEASURED if command in DRAWN])
def test_plots_are_shown(command, name):
    figure = f"benchmarks/figures/{name}"
    line = f"python -m benchmarks {command} --from-json {figure}.json --plot {figure}.png"
    assert (ROOT / f"{figure}.png").exists(), f"draw it: {line}"
    assert f"{figure}.png" in (ROOT / DRAWN_ELSEWHERE.get(name, DRAWN[command])).read_text()
