"""Every public name has an example in its docstring, and the examples run and give what stands below them."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import dispatch_compile as dc
from dispatch_compile import testing

pytestmark = pytest.mark.selective  # the examples trace what they show, and nothing more

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = ("dispatch_compile", "dispatch_compile.ops", "dispatch_compile._trace.trace")
FOR_PEOPLE_WITH_VLLM = ("enable", "disable", "catch_custom_ops")  # the rest of dispatch_compile.vllm is for the package

BY_THE_PACKAGE = "called by the package alone"
SHOWN_BY_CLASS = "the example of its class shows it"
WITHOUT_EXAMPLE = {
    "DispatchCompileMode.look_for_ops": BY_THE_PACKAGE,
    "DispatchCompileMode.on_torchs_stack": BY_THE_PACKAGE,
    "DispatchCompileMode.route_of": BY_THE_PACKAGE,
    "NativeCache.counters_of": BY_THE_PACKAGE,
    "NativeCache.drop_unregistered": BY_THE_PACKAGE,
    "NativeCache.existing_table": BY_THE_PACKAGE,
    "NativeCache.table": BY_THE_PACKAGE,
    "OpCall.arguments": SHOWN_BY_CLASS,
    "OpCall.result": SHOWN_BY_CLASS,
    "OpCall.text_before_result": BY_THE_PACKAGE,
    "Trace.begin": BY_THE_PACKAGE,
    "Trace.end": BY_THE_PACKAGE,
    "Trace.end_raising": BY_THE_PACKAGE,
    "TraceEvent.compiled": BY_THE_PACKAGE,
    "TraceEvent.decided_like": BY_THE_PACKAGE,
    "TraceEvent.not_compiled": BY_THE_PACKAGE,
    "TraceEvent.raised": BY_THE_PACKAGE,
}


def public() -> Iterator[tuple[str, Any]]:
    """Public objects by name: what the package exports, with the methods and properties of its classes."""
    for name in dc.__all__:
        value = getattr(dc, name)
        if name == "__version__" or isinstance(value, ModuleType):
            continue
        yield name, value
        if isinstance(value, type):
            members = ((member, inspect.getattr_static(value, member)) for member in vars(value))
            yield from (
                (f"{name}.{member}", getattr(value, member))
                for member, raw in members
                if not member.startswith("_") and isinstance(raw, (property, classmethod)) | inspect.isroutine(raw)
            )
    for room, names in ((dc.ops, dc.ops.__all__), (dc.vllm, FOR_PEOPLE_WITH_VLLM), (testing, vars(testing))):
        for name in names:
            value = getattr(room, name)
            if room is not testing or getattr(value, "__module__", None) == testing.__name__:
                yield f"{room.__name__.removeprefix('dispatch_compile.')}.{name}", value


PUBLIC = dict(public())
SHOWN = {**{name: importlib.import_module(name) for name in MODULES}, **PUBLIC}


def examples_of(name: str) -> doctest.DocTest:
    scope = {"torch": torch, "dc": dc, "__name__": "__main__"}
    return doctest.DocTestParser().get_doctest(inspect.getdoc(SHOWN[name]) or "", scope, name, name, 0)


def test_every_public_name_has_an_example():
    without = {name for name in PUBLIC if not examples_of(name).examples}
    assert without == set(WITHOUT_EXAMPLE)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.vllm if name.startswith("vllm.") else ())
        for name in SHOWN
        if examples_of(name).examples
    ],
)
def test_examples_run(name, tmp_path, monkeypatch):
    if "assert_expected_trace" in name:
        pytest.importorskip("expecttest")
    monkeypatch.chdir(tmp_path)  # some write files
    umask, ops = os.umask(0o022), set(dc.IrOp.registry)
    said: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dc.DispatchCompileWarning)
            doctest.DocTestRunner(optionflags=OPTIONS, verbose=False).run(examples_of(name), out=said.append)
    finally:
        os.umask(umask)
        dc.disable()
        for left in set(dc.IrOp.registry) - ops:
            dc.IrOp.registry[left].unregister()
    assert not said, "".join(said)
