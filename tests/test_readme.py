"""What README says runs as it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_first_example_prints_what_stands_below_it(tmp_path):
    code, printed = re.findall(r"```(?:python)?\n(.*?)```", README.read_text(), flags=re.DOTALL)[:2]
    script = tmp_path / "example.py"  # custom_op reads the function's source file
    script.write_text(code)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == printed
