"""The package's version, and what it says to a torch that it does not know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dispatch_compile as dc
from dispatch_compile._version import check_torch

ROOT = Path(__file__).parents[1]


def test_version_and_metadata():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    with open(ROOT / "pyproject.toml", "rb") as file:
        text = tomllib.load(file)
    assert dc.__version__ == "0.1.0"
    assert text["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "dispatch_compile._version.__version__"}
    assert text["project"]["dependencies"] == ["torch>=2.11,<2.16", "filelock"]


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0+cu130", "2.15.0a0+git1234", "2.15.2"])
def test_torch_that_will_do(version):
    check_torch(version)


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0.dev20261101+cpu", "2.16.0a0", "3.0.0", "1.13.1"])
def test_torch_that_will_not_do(version):
    with pytest.raises(
        ImportError, match=r"works with torch 2\.11 to 2\.15, and this is torch .*: install one of these"
    ):
        check_torch(version)


def test_it_says_so_before_anything_else_can_fail():
    program = (
        "import torch; torch.__version__ = '2.16.0'; del torch._C._dispatch_keyset_full_after; import dispatch_compile"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.stderr.splitlines()[-1].startswith("ImportError: dispatch_compile 0.1.0 works with torch 2.11 to 2.15")
