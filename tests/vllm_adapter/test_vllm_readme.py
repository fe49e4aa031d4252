"""What README says of vLLM is what is seen with the real one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="needs the real vLLM")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not vllm.__version__.startswith("0.33."), reason="vLLM 0.23.0 compiles no SiluAndMul on a CPU"),
]

ROOT = Path(__file__).parents[2]
SECTION = re.search(r"^## With vLLM\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_command_prints_what_stands_below_it():
    assert SECTION is not None
    command, shown = re.findall(r"^    (.*python -m .*)\n\n```\n(.*?)```", SECTION[1], re.MULTILINE | re.DOTALL)[0]
    assert command.startswith("VLLM_TARGET_DEVICE=cpu python -m ")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if not torch.cuda.is_available():
        environment["VLLM_TARGET_DEVICE"] = "cpu"
    run = subprocess.run(
        [sys.executable, *command.split()[2:]], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    trace = run.stderr.partition("Trace of examples/vllm_layers.py\n")[2].partition("\n\nSummary")[0]
    assert trace.startswith(shown)
    assert [line.split("  # ")[1].split(":")[0] for line in trace.splitlines() if "  # " in line] == [
        *["compiled native, new"] * 3,
        *["compiled native, reused"] * 3,  # with another token count
    ]
