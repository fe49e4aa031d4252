"""What README says runs as it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dispatch_compile as dc

pytestmark = pytest.mark.run_once

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("heading", ["# dispatch_compile", "### A function you have"])
def test_an_example_prints_what_stands_below_it(heading, tmp_path):
    section = README.partition(f"{heading}\n")[2]
    code, printed = re.findall(r"```(?:python)?\n(.*?)```", section, flags=re.DOTALL)[:2]
    script = tmp_path / "example.py"  # custom_op reads the function's source file
    script.write_text(code)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == printed


def test_layers_share_their_code():
    section = README.partition("### A layer you have\n")[2]
    scope = {"torch": torch, "dc": dc, "__name__": "example"}
    exec(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)[0], scope)
    layers, mode = [scope["Norm"](64), scope["Norm"](64)], dc.DispatchCompileMode()
    h = torch.randn(4, 64)
    with torch.inference_mode():
        expected = [layer(h) for layer in layers]
        with mode:
            actual = [layer(h) for layer in layers]
    torch.testing.assert_close(actual, expected)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 2)
