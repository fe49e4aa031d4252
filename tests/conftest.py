"""Fixtures: throw-away ops, and skipping what this machine cannot run."""

from __future__ import annotations

import importlib.util
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import TAKES_VECTORS_FOR_GRANTED
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import dispatch_compile as dc
from dispatch_compile._saved.artifacts import FOLDER_VARIABLE

_serial = itertools.count()
OPAQUE_NAMESPACE = "dispatch_compile_test"
AUTO_WORKERS, MOST_WORKERS = "PYTEST_XDIST_AUTO_NUM_WORKERS", 6


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = {}
    if not torch.cuda.is_available():
        missing["cuda"] = pytest.mark.skip(reason="needs a CUDA device")
    if importlib.util.find_spec("vllm") is None:
        missing["vllm"] = pytest.mark.skip(reason="needs the real vLLM")
    if config.getoption("--interception") == "every op":
        missing["selective"] = pytest.mark.skip(reason="any mode on torch's stack changes this")
    for item in items:
        for marker, skip in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(skip)
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Else a worker is alone with one of them at the end. On one core they stay where they are.
        items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--interception",
        choices=("selective", "every op"),
        default="selective",
        help="how modes see calls whose trace does not ask for every op (see CONTRIBUTING.md)",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """For ``-n auto``: none to run one file, whose tests stay together; else one for each core that this process may
    use, hyperthreads included, up to what memory is good for."""
    if AUTO_WORKERS in os.environ:
        return None  # as xdist has it
    files = {name.partition("::")[0] for name in config.args}
    if len(files) == 1 and files.pop().endswith(".py"):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def pytest_configure(config: pytest.Config) -> None:
    os.environ.pop(FOLDER_VARIABLE, None)  # code that was saved elsewhere would be run in place of what is tested
    # Inductor need not try which vector instructions the CPU has: that takes each process of the tests a second, and 9
    # where Inductor's cache is empty.
    os.environ.setdefault(TAKES_VECTORS_FOR_GRANTED, "1")
    # Workers have as many threads each as there are cores: those that wait are not to keep the others from running.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if config.getoption("--interception") == "every op":
        from dispatch_compile import _mode

        _mode._interception_for = lambda trace: "every op"


@pytest.fixture(autouse=True)
def gpu_to_share(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests on a GPU run beside each other, in several processes; one that fills its memory runs alone."""
    if request.node.get_closest_marker("cuda") is None or "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    fcntl = pytest.importorskip("fcntl", reason="needs locks of files")
    alone = request.node.get_closest_marker("fills_gpu") is not None
    with open(os.path.join(tempfile.gettempdir(), "dispatch_compile_tests_gpu.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield  # the lock goes with the file


@pytest.fixture(scope="session")
def fake_tensors_on_the_main_thread() -> None:
    """torch 2.11, built for CUDA and without a device, crashes when the thread is gone that used them first."""
    with FakeTensorMode():
        pass


@pytest.fixture
def define_ir_op() -> Iterator[Callable[..., dc.IrOp]]:
    """``define_ir_op(native, **register_op's options)``: an IR op under a name of its own, gone after the test."""
    defined: list[dc.IrOp] = []

    def define(native: Callable[..., Any], *, name: str | None = None, **options: Any) -> dc.IrOp:
        name = name or f"{native.__name__.strip('_')}_{next(_serial)}"
        op = dc.register_op(native, name=name) if not options else dc.register_op(name=name, **options)(native)
        defined.append(op)
        return op

    yield define
    for op in defined:
        op.unregister()


@pytest.fixture
def define_opaque() -> Iterator[Callable[..., Any]]:
    """``define_opaque(body)``: an opaque op as vLLM registers them, under a name of its own, gone after the test."""
    libraries: list[torch.library.Library] = []

    def define(
        body: Callable[..., Any],
        *,
        name: str | None = None,
        fake: Callable[..., Any] | None = None,
        mutates_args: tuple[str, ...] = (),
        key: str = "CompositeExplicitAutograd",
    ) -> Any:
        library = torch.library.Library(OPAQUE_NAMESPACE, "FRAGMENT")
        libraries.append(library)
        name = name or f"{body.__name__.strip('_')}_{next(_serial)}"
        library.define(name + torch.library.infer_schema(body, mutates_args=mutates_args))
        library.impl(name, body, key)
        if fake is not None:
            torch.library.register_fake(f"{OPAQUE_NAMESPACE}::{name}", fake, lib=library)
        return getattr(getattr(torch.ops, OPAQUE_NAMESPACE), name).default

    yield define
    for library in libraries:
        library._destroy()


class CountedOp:
    """An IR op that knows how often Python ran its native implementation: on every native call, and once for each
    capture, but never when compiled code runs."""

    def __init__(self, define_ir_op: Callable[..., dc.IrOp]) -> None:
        self.python_runs = 0

        def affine(x: Tensor, factor: float = 2.0) -> Tensor:
            self.python_runs += 1
            return x * factor + 1

        self.op = define_ir_op(affine)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.op(*args, **kwargs)
        return result


@pytest.fixture
def counted(define_ir_op: Callable[..., dc.IrOp]) -> CountedOp:
    """An IR op ``x * factor + 1`` that counts how often its native implementation runs as Python."""
    return CountedOp(define_ir_op)
