"""``python -m dispatch_compile trace``: scripts run as Python runs them, and what is said of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from expecttest import assert_expected_inline

import dispatch_compile as dc
from dispatch_compile.trace_script.cli import main

pytestmark = [pytest.mark.long, pytest.mark.run_once]

OPS = """\
import os
import sys

import torch

import dispatch_compile as dc


@dc.register_op
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("script::inner", mutates_args=())
def inner(x: torch.Tensor) -> torch.Tensor:
    return twice(x)


@torch.library.custom_op("script::outer", mutates_args=())
def outer(x: torch.Tensor) -> torch.Tensor:
    return inner(x) + twice(x)


mode = dc.DispatchCompileMode(config=dc.CompileConfig(providers=["no"]))  # nothing is compiled inside it
"""
IN_ITS_OWN_MODE = f"""{OPS}
with mode:
    outer(torch.ones(4, 3))
"""


def _python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def _trace(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return _python("-m", "dispatch_compile", "trace", *arguments, cwd=cwd)


def _without_seconds(text: str) -> str:
    return re.sub(r" +(compile seconds|\d+\.\d\d)$", "", text, flags=re.MULTILINE)


@pytest.fixture
def script(tmp_path):
    """``script(text)`` writes ``script.py``."""
    return (tmp_path / "script.py").write_text


# ---- What is shown


def test_calls_in_the_scripts_own_modes(script, tmp_path):
    script(f"{IN_ITS_OWN_MODE}\nprint(mode.trace)")
    run = _trace("script.py", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (0, "None\n")
    assert_expected_inline(
        _without_seconds(run.stderr),
        """\
Trace of script.py
script::outer(t: f32[4, 3])  ->  t: f32[4, 3]
  script::inner(t: f32[4, 3])  ->  t: f32[4, 3]
    dispatch_compile::twice(t: f32[4, 3])  ->  t: f32[4, 3]  # aside native, provider 'native' is not in providers ('no',)
  dispatch_compile::twice(t: f32[4, 3])  ->  t: f32[4, 3]  # aside native, provider 'native' is not in providers ('no',)

Summary
op                       provider  calls  compiled  eager  aside  specializations
dispatch_compile::twice  native        2         0      0      2                0
""",  # noqa: E501 - a line of a trace is as long as it is
    )


def test_calls_outside_of_any_mode_of_the_script(script, tmp_path):
    script(f"{OPS}\nouter(torch.ones(4, 3))")
    run = _trace("--ids", "--stacks", "script.py", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "Trace of script.py\n" in run.stderr, run.stderr
    shown = run.stderr.partition("Trace of script.py\n")[2].partition("\nSummary")[0]  # Inductor may warn before
    assert_expected_inline(
        shown.replace(str(tmp_path), "HERE"),
        """\
script::outer(t$0: f32[4, 3])  ->  t$3: f32[4, 3]
    at HERE/script.py:26 in <module>
  script::inner(t$0: f32[4, 3])  ->  t$1: f32[4, 3]
      at HERE/script.py:26 in <module>
      at HERE/script.py:21 in outer
    dispatch_compile::twice(t$0: f32[4, 3])  ->  t$1: f32[4, 3]  # compiled native, new: [s0, 3]
        at HERE/script.py:26 in <module>
        at HERE/script.py:21 in outer
        at HERE/script.py:16 in inner
  dispatch_compile::twice(t$0: f32[4, 3])  ->  t$2: f32[4, 3]  # compiled native, reused: [s0, 3]
      at HERE/script.py:26 in <module>
      at HERE/script.py:21 in outer
""",
    )


def test_every_op(script, tmp_path):
    script(IN_ITS_OWN_MODE)
    run = _trace("--all", "--max-events", "2", "script.py", cwd=tmp_path)
    assert_expected_inline(
        _without_seconds(run.stderr),
        """\
Trace of script.py
(6 earlier calls dropped)
    aten::mul.Tensor(t: f32[4, 3], 2)  ->  t: f32[4, 3]
  aten::add.Tensor(t: f32[4, 3], t: f32[4, 3])  ->  t: f32[4, 3]
""",
    )


def test_files(script, tmp_path):
    script("import os; os.mkdir('elsewhere'); os.chdir('elsewhere')\n" + IN_ITS_OWN_MODE)
    run = _trace("--json", "trace.jsonl", "--perfetto", "timeline.json", "script.py", cwd=tmp_path)
    shown = run.stderr.removeprefix("Trace of script.py\n").partition("\n\nSummary")[0]
    assert str(dc.Trace.load(tmp_path / "trace.jsonl")) == shown
    slices = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    assert "script::outer" in {each["name"] for each in slices}


def test_an_op_that_cannot_be_compiled(script, tmp_path):
    script(f"""{OPS}
@dc.register_op
def first(x: torch.Tensor) -> torch.Tensor:
    return x * x.sum().item()

print(first(torch.ones(2)))
""")
    run = _trace("script.py", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (0, "tensor([2., 2.])\n")
    assert "dispatch_compile::first(t: f32[2])  ->  t: f32[2]  # eager native, " in run.stderr


def test_no_ir_op(script, tmp_path):
    script("import sys; sys.exit()")
    run = _trace("script.py", cwd=tmp_path)
    assert run.returncode == 0
    assert_expected_inline(
        run.stderr,
        """\
No IR op was called inside script.py on its main thread. Perhaps
- it uses none: none of vllm.ir, of dispatch_compile.ops, or given to register_op or register_native;
- it calls them on other threads (see dispatch_compile.inherit_modes) or in other processes;
- torch.compile has made them part of a larger compiled whole;
- vLLM's torch wrapping is off (see vllm.ir.enable_torch_wrap).
""",
    )


@pytest.mark.vllm
def test_vllms_ops_are_found_when_the_script_registers_them(script, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    script("""\
import torch
import vllm.ir

@vllm.ir.register_op
def registered_last(x: torch.Tensor) -> torch.Tensor:
    return x * 2

registered_last(torch.ones(4, 3))
""")
    run = _trace("script.py", cwd=tmp_path)
    assert "vllm_ir::registered_last(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, new: [s0, 3]" in run.stderr


# ---- The script runs as ever


SURROUNDINGS = """\
import inspect, sys
def here(): pass
print([sys.argv[1:], sys.path, __name__, __file__, __spec__ and __spec__.name])
print(sys.modules["__main__"].here is here, inspect.getsource(here))
print(sys.argv[0])
"""


def test_a_script_sees_what_python_shows_it(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "script.py").write_text(SURROUNDINGS)
    (tmp_path / "link.py").symlink_to(tmp_path / "folder" / "script.py")
    for path in (tmp_path / "folder" / "script.py", tmp_path / "link.py"):
        arguments = (str(path), "--all", "-m", "--js", "--", "-h")
        assert _trace(*arguments, cwd=tmp_path).stdout == _python(*arguments, cwd=tmp_path).stdout != ""


def test_a_module_sees_what_python_shows_it(tmp_path):
    (tmp_path / "package").mkdir()
    for name in ("__init__", "__main__", "module"):
        (tmp_path / "package" / f"{name}.py").write_text(SURROUNDINGS.replace("here()", f"here({name}=0)"))
    for name in ("package", "package.module"):
        arguments = ("-m", name, "--all", "x")
        assert _trace(*arguments, cwd=tmp_path).stdout == _python(*arguments, cwd=tmp_path).stdout != ""


def test_a_script_that_raises(script, tmp_path):
    script(f"{IN_ITS_OWN_MODE}\n\ndef fail():\n    raise KeyError('theirs')\n\nfail()")
    run = _trace("--json", "trace.jsonl", "script.py", cwd=tmp_path)
    assert run.returncode == 1
    traceback = run.stderr.partition("Trace of script.py\nscript::outer")[0].replace(str(tmp_path), "HERE")
    assert_expected_inline(
        traceback,
        """\
Traceback (most recent call last):
  File "HERE/script.py", line 33, in <module>
    fail()
  File "HERE/script.py", line 31, in fail
    raise KeyError('theirs')
KeyError: 'theirs'
""",
    )
    assert len(dc.Trace.load(tmp_path / "trace.jsonl")) == 2


@pytest.mark.parametrize(("end", "status", "said"), [("sys.exit(7)", 7, ""), ("sys.exit('bye')", 1, "bye\n")])
def test_a_script_that_exits(end, status, said, script, tmp_path):
    script(f"{IN_ITS_OWN_MODE}\n{end}")
    run = _trace("script.py", cwd=tmp_path)
    assert run.returncode == status
    assert re.fullmatch(
        rf"Trace of script\.py\n(.*\n)+\nSummary\nop .*\ndispatch_compile::twice .*\n{said}", run.stderr
    )


def test_a_script_that_is_interrupted(script, tmp_path):
    # A process that a shell started in the background ignores the signal, unless it asks for it.
    interrupt = "signal.signal(signal.SIGINT, signal.default_int_handler)\n    signal.raise_signal(signal.SIGINT)"
    script(f"import signal\n{OPS}\nwith mode:\n    outer(torch.ones(4, 3))\n    {interrupt}\n    print('not reached')")
    run = _trace("script.py", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (130, "")
    assert re.match(r"(?s)Traceback .*script\.py.*\nKeyboardInterrupt\nTrace of script\.py\nscript::outer", run.stderr)


def test_modes_that_the_script_never_leaves(script, tmp_path):
    script(f"{OPS}\nmode.__enter__()\nmode.__enter__()\nouter(torch.ones(4, 3))")
    run = _trace("script.py", cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_a_script_with_a_syntax_error(script, tmp_path):
    script("x = = 1")
    run, python = _trace("script.py", cwd=tmp_path), _python("script.py", cwd=tmp_path)
    assert run.returncode == python.returncode == 1
    assert run.stderr == f"{python.stderr}No IR op was called inside script.py on its main thread.\n"


def test_a_package_that_is_no_program(tmp_path):
    run = _trace("-m", "json", cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.startswith("ImportError: No module named json.__main__; 'json' is a package and cannot be")


# ---- Arguments that make no sense


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: SCRIPT"),
        ("--al {script}", "unrecognized arguments: --al"),
        ("missing.py", "there is no file 'missing.py'"),
        ("-m missing.module", "there is no module 'missing.module'"),
        ("-m .relative", "there is no module '.relative'"),
        ("--max-events many {script}", "--max-events: invalid int value: 'many'"),
        ("--max-events -1 {script}", "max_events must be 0 or more, not -1"),
        ("--json {here} {script}", "Is a directory"),
        ("--perfetto {here}/missing/file {script}", "No such file or directory"),
    ],
)
def test_wrong_arguments_run_nothing(arguments, message, script, tmp_path, capsys):
    script("raise AssertionError('ran')")
    with pytest.raises(SystemExit) as exit:
        main(arguments.format(here=tmp_path, script=tmp_path / "script.py").split())
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
