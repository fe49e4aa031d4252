"""``assert_expected_trace``: what it compares, that it can fail, and that accepting rewrites the caller's text."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import EAGER
from torch import Tensor

import dispatch_compile as dc
from dispatch_compile.testing import assert_expected_trace

pytestmark = pytest.mark.run_once

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def opaque(define_ir_op, define_opaque):
    def golden_scale(x: Tensor) -> Tensor:
        return x * 2

    scale = define_ir_op(golden_scale, name="golden_scale")

    def golden_body(x: Tensor) -> Tensor:
        return scale(x) + 1

    return define_opaque(golden_body, name="golden_body")


@pytest.fixture
def mode():
    return dc.DispatchCompileMode(config=EAGER)


NEW = """\
dispatch_compile_test::golden_body(t: f32[4, 3])  ->  t: f32[4, 3]
  dispatch_compile::golden_scale(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, new: [s0, 3]"""
REUSED = NEW.replace("new", "reused")


def test_the_same_text_passes(opaque, mode):
    assert_expected_trace(lambda: opaque(torch.ones(4, 3)), NEW, mode=mode)
    assert_expected_trace(lambda: opaque(torch.ones(4, 3)), REUSED, mode=mode)
    assert mode.trace is None
    assert mode.cache.stats().hits == 2


def test_another_text_fails_and_the_message_says_where(opaque, mode):
    with pytest.raises(AssertionError, match=r"(?s)-  dispatch_compile::golden_scale.*# passed.*\+  .*# compiled"):
        assert_expected_trace(
            lambda: opaque(torch.ones(4, 3)), NEW.replace("compiled native, new", "passed native"), mode=mode
        )


def test_by_default_in_the_callers_mode(opaque, mode):
    with mode:
        assert_expected_trace(lambda: opaque(torch.ones(4, 3)), NEW)
    assert mode.cache.stats().compiles == 1


def test_by_default_in_a_new_mode_where_the_caller_has_none(opaque, monkeypatch):
    cheap = functools.partial(dc.DispatchCompileMode, config=EAGER)
    monkeypatch.setattr("dispatch_compile.testing.DispatchCompileMode", cheap)
    for _ in range(2):
        assert_expected_trace(lambda: opaque(torch.ones(4, 3)), NEW)


def test_a_mode_that_traces_records_as_ever(opaque):
    mode = dc.DispatchCompileMode(config=EAGER, trace=dc.Trace(ids=True))
    assert_expected_trace(lambda: opaque(torch.ones(4, 3)), NEW, mode=mode)
    assert [event.arguments for event in mode.trace.events] == ["t$0: f32[4, 3]"]


def test_an_error_of_the_calls_comes_out(mode):
    def fail() -> None:
        raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        assert_expected_trace(fail, "", mode=mode)


def test_without_expecttest(monkeypatch, mode):
    monkeypatch.setitem(sys.modules, "expecttest", None)
    with pytest.raises(ImportError, match=r"pip install dispatch-compile\[test\]"):
        assert_expected_trace(lambda: None, "", mode=mode)


# ---- Accepting


OPAQUE = """\
import torch

import dispatch_compile as dc

MODE = dc.DispatchCompileMode(config=dc.CompileConfig(providers=("none",)))  # compiles nothing


@torch.library.custom_op("mylib::body", mutates_args=())
def body(x: torch.Tensor) -> torch.Tensor:
    return dc.ops.silu_and_mul(x)


def run():
    body(torch.ones(4, 6))
"""
# Where a call of assert_expected_trace may stand. Each in a file of its own: expecttest loses count of the lines where
# it rewrites many texts of one file.
SITUATIONS = {
    "one_line": """\
def test():
    assert_expected_trace(run, '''''', mode=MODE)
""",
    "several_lines": """\
def test():
    assert_expected_trace(
        run,
        '''an old text
of two lines''',
        mode=MODE,
    )
""",
    "with_block": """\
def test():
    with contextlib.nullcontext(), MODE:
        assert_expected_trace(run, '''''')
""",
    "unittests_case": """\
class TestCase(unittest.TestCase):
    def test(self):
        with self.subTest(tokens=4):
            assert_expected_trace(run, '''''', mode=MODE)
""",
    "expecttests_case": """\
class TestCase(expecttest.TestCase):
    def test(self):
        assert_expected_trace(run, '''''', mode=MODE)
""",
    "helper": """\
def same(expected):
    assert_expected_trace(run, expected, mode=MODE, skip=1)


def test():
    same('''''')
""",
}
IMPORTS = """\
import contextlib
import unittest

import expecttest
from opaque import MODE, run

from dispatch_compile.testing import assert_expected_trace


"""
TEXT = """\
mylib::body(t: f32[4, 6])  ->  t: f32[4, 3]
  dispatch_compile::silu_and_mul(t: f32[4, 6])  ->  t: f32[4, 3]  # aside native, provider 'native' is not in providers ('none',)"""  # noqa: E501


def _pytest(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EXPECTTEST_ACCEPT": "", **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_accepting_rewrites_the_callers_text(tmp_path):
    (tmp_path / "opaque.py").write_text(OPAQUE)
    files = {tmp_path / f"test_{name}.py": IMPORTS + code for name, code in SITUATIONS.items()}
    for file, text in files.items():
        file.write_text(text)
    accepting = _pytest(tmp_path, EXPECTTEST_ACCEPT="1")
    assert f"{len(files)} passed" in accepting.stdout, accepting.stdout
    for file, text in files.items():
        assert file.read_text() == re.sub("(?s)'''.*'''", lambda _: f"'''\\\n{TEXT}'''", text)

    changed = tmp_path / "test_with_block.py"
    changed.write_text(changed.read_text().replace("f32[4, 3]", "f32[4, 4]"))
    comparing = _pytest(tmp_path)
    assert f"1 failed, {len(files) - 1} passed" in comparing.stdout, comparing.stdout
    assert "FAILED test_with_block.py::test" in comparing.stdout


# ---- README


def test_the_example_in_readme(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (example,) = [block for block in blocks if "assert_expected_trace" in block]
    file = tmp_path / "test_expert.py"
    file.write_text(example)
    passing = _pytest(tmp_path)
    assert passing.returncode == 0, passing.stdout

    file.write_text(example.replace("dc.ops.silu_and_mul(x @ w)", "(x @ w)[:, :128]"))
    assert "1 failed" in _pytest(tmp_path).stdout
