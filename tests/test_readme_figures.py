"""The benchmark figures in README.md are those in ``benchmarks/*.json``.

In README they stand between ``<!-- bench:NAME ARGUMENTS -->`` and ``<!-- /bench -->``, as printed by
``python -m dispatch_compile bench --from-json benchmarks/NAME.json --markdown ARGUMENTS``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dispatch_compile.__main__ import main

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^<!-- bench:(\w+)(.*?) -->\n(.*?)^<!-- /bench -->$", re.MULTILINE | re.DOTALL)
NAMES = ("cpu", "cpu_small", "h100", "h100_tuning")


def blocks(name: str) -> list[tuple[str, str]]:
    """The arguments and the text of each block of that name."""
    readme = ROOT / "README.md"
    assert readme.exists(), "there is no README.md"
    return [(match[2], match[3]) for match in BLOCK.finditer(readme.read_text()) if match[1] == name]


def test_every_block_has_a_known_name():
    assert {match[1] for match in BLOCK.finditer((ROOT / "README.md").read_text())} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_those_measured(name, capsys):
    path = ROOT / "benchmarks" / f"{name}.json"
    assert path.exists(), f"write it: python -m dispatch_compile bench --json benchmarks/{name}.json"
    found = blocks(name)
    assert found, f"README.md has no block between <!-- bench:{name} --> and <!-- /bench -->"
    for arguments, text in found:
        assert main(["bench", "--from-json", str(path), "--markdown", *arguments.split()]) == 0
        assert text.strip() == capsys.readouterr().out.strip(), (
            f"README.md is not up to date: put in the block what this prints:\n"
            f"python -m dispatch_compile bench --from-json benchmarks/{name}.json --markdown{arguments}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_plots_are_shown(name):
    command = f"python -m dispatch_compile bench --from-json benchmarks/{name}.json --plot benchmarks/{name}.png"
    assert (ROOT / "benchmarks" / f"{name}.png").exists(), f"draw it: {command}"
    assert f"benchmarks/{name}.png" in (ROOT / "README.md").read_text()
