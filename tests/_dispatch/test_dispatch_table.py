"""What a mode changes in torch's dispatch tables: the kernel at BackendSelect of the ops that it catches, as long as it
lives, and nothing else, of all the ops that there are."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from typing import Any

import dispatch_table_program
import pytest
import torch
from dispatch_table_program import CUSTOM_OPS, KERNELS_OF_LIBRARY_OPS, NAMESPACE
from torch import Tensor

import dispatch_compile as dc

pytestmark = pytest.mark.run_once

IR_OPS = {overload.name() for name in dc.ops.__all__ for overload in dc._ir.protocol.overloads(getattr(dc.ops, name))}
FOREIGN_OPS = {f"{NAMESPACE}::{name}" for name in [*KERNELS_OF_LIBRARY_OPS, *CUSTOM_OPS]}
# A call of the one never reaches BackendSelect, the other has a kernel there.
OUT_OF_REACH = {f"{NAMESPACE}::implicit", f"{NAMESPACE}::selects_backend"}
OPAQUE = FOREIGN_OPS - OUT_OF_REACH
NOTHING: set[str] = set()

# The ops that differ after each step of the program from what they were before it.
STEPS = {
    "a mode is made": IR_OPS,
    "it is entered": IR_OPS,
    "ops are called in it": IR_OPS,
    "it is left": IR_OPS,
    "it is dropped": NOTHING,
    "a mode for one op is entered": {"dispatch_compile::rms_norm"},
    "the mode for one op is dropped": NOTHING,
    "a tracing mode is entered": IR_OPS | OPAQUE,
    "ops are called in the tracing mode": IR_OPS | OPAQUE,
    "another mode is entered inside": IR_OPS | OPAQUE,
    "the tracing mode is dropped": IR_OPS,
    "a foreign op gets a reference implementation": IR_OPS | {f"{NAMESPACE}::explicit"},
    "it loses it": IR_OPS,
    "the last mode is dropped": NOTHING,
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, dispatch_table_program.__file__], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_every_op_of_torch_is_compared(found):
    assert found["number of ops"] > 3000


def test_the_import_defines_the_ir_ops_and_changes_no_other(found):
    assert set(found["defined by the import"]) == IR_OPS
    assert found["changed by the import"] == {}


def test_every_step_is_known(found):
    assert list(found["after each step"]) == list(STEPS)


@pytest.mark.parametrize("step", list(STEPS))
def test_no_other_op_differs(step, found):
    assert found["after each step"][step].keys() == STEPS[step]


@pytest.mark.parametrize("step", list(STEPS))
def test_nothing_but_backend_select_differs(step, found):
    assert {key for keys in found["after each step"][step].values() for key in keys} <= {"BackendSelect"}


def test_nothing_is_left(found):
    assert found["defined by a mode"] == []
    assert found["registered by a mode"] == []


# ---- Kernels that come while ops are caught


@pytest.fixture
def caught(define_opaque, monkeypatch) -> tuple[Any, list[dc.DispatchCompileMode]]:
    """An op that a tracing mode catches, and the only hold on that mode."""
    # Modes that other tests left alive would catch it too.
    monkeypatch.setattr("dispatch_compile._mode._modes", weakref.WeakSet())

    def double(x: Tensor) -> Tensor:
        return x * 2

    op, mode = define_opaque(double), dc.DispatchCompileMode(trace=True)
    with mode:
        assert catches(op)
    return op, [mode]


def catches(op: Any) -> bool:
    return "BackendSelect: registered at" in torch._C._dispatch_dump_table(op.name())


def kernel_of_its_owner(op: Any) -> torch.library.Library:
    library = torch.library.Library(op.namespace, "IMPL")
    library.impl(op.name().partition("::")[2], lambda x: x * 3, "BackendSelect", allow_override=True)
    return library


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize("mode_first", [True, False], ids=["mode goes first", "kernel goes first"])
def test_a_backend_select_kernel_that_comes_later_stays_its_owners(mode_first, caught):
    op, hold = caught
    library = kernel_of_its_owner(op)
    assert op(torch.ones(2)).tolist() == [3.0, 3.0]
    if mode_first:
        hold.clear()
        gc.collect()
        assert op(torch.ones(2)).tolist() == [3.0, 3.0]
        library._destroy()
    else:
        library._destroy()
        assert catches(op)
        hold.clear()
        gc.collect()
    assert not catches(op)
    assert op(torch.ones(2)).tolist() == [2.0, 2.0]


def test_other_kernels_that_come_later_are_called(caught):
    op, hold = caught
    library = torch.library.Library(op.namespace, "IMPL")
    library.impl(op.name().partition("::")[2], lambda x: x * 5, "CPU")
    try:
        with hold[0]:
            assert op(torch.ones(2)).tolist() == [5.0, 5.0]
    finally:
        library._destroy()
    with hold[0]:
        assert op(torch.ones(2)).tolist() == [2.0, 2.0]
