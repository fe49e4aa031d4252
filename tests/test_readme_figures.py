"""The benchmark figures in README.md and docs/ are those in ``benchmarks/*.json``.

They stand there between ``<!-- COMMAND:NAME ARGUMENTS -->`` and ``<!-- /COMMAND -->``, as printed by
``python -m dispatch_compile COMMAND --from-json benchmarks/NAME.json --markdown ARGUMENTS``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dispatch_compile.__main__ import main

pytestmark = pytest.mark.run_once

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = "bench|passthrough|restart|numerics|vllm-bodies"
BLOCK = re.compile(rf"^<!-- ({COMMANDS}):(\w+)(.*?) -->\n(.*?)^<!-- /\1 -->$", re.MULTILINE | re.DOTALL)
MEASURED = [
    ("bench", "cpu"),
    ("bench", "cpu_small"),
    ("bench", "h100"),
    ("bench", "h100_tuning"),
    ("bench", "h200_compositions"),
    ("passthrough", "passthrough_cpu"),
    ("restart", "restart_cpu"),
    ("passthrough", "passthrough_h100"),
    ("vllm-bodies", "vllm_bodies_h100"),
    ("numerics", "numerics_cpu"),
    ("numerics", "numerics_h200"),
    ("numerics", "sweep_cpu"),
    ("numerics", "sweep_h200"),
]
DRAWN = {"bench": "README.md", "vllm-bodies": "docs/vllm_bodies.md"}  # and where the pictures are shown
DRAWN_ELSEWHERE = {"h200_compositions": "docs/fusion.md"}


def blocks() -> list[tuple[str, str, str, str]]:
    """Command, name, arguments and text of each block."""
    return [match.groups() for page in PAGES for match in BLOCK.finditer(page.read_text())]


def test_every_block_is_known_and_every_measurement_is_shown():
    assert {(command, name) for command, name, _, _ in blocks()} == set(MEASURED)


@pytest.mark.parametrize(("command", "name"), MEASURED)
def test_figures_are_those_measured(command, name, capsys):
    path = ROOT / "benchmarks" / f"{name}.json"
    assert path.exists(), f"write it: python -m dispatch_compile {command} --json benchmarks/{name}.json"
    for arguments, text in [block[2:] for block in blocks() if block[:2] == (command, name)]:
        assert main([command, "--from-json", str(path), "--markdown", *arguments.split()]) == 0
        assert text.strip() == capsys.readouterr().out.strip(), (
            f"the block {command}:{name} is not up to date: put there what this prints:\n"
            f"python -m dispatch_compile {command} --from-json benchmarks/{name}.json --markdown{arguments}"
        )


@pytest.mark.parametrize(("command", "name"), [(command, name) for command, name in MEASURED if command in DRAWN])
def test_plots_are_shown(command, name):
    line = f"python -m dispatch_compile {command} --from-json benchmarks/{name}.json --plot benchmarks/{name}.png"
    assert (ROOT / "benchmarks" / f"{name}.png").exists(), f"draw it: {line}"
    assert f"benchmarks/{name}.png" in (ROOT / DRAWN_ELSEWHERE.get(name, DRAWN[command])).read_text()
