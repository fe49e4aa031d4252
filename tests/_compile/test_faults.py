"""Faults of the machine and of the compiler while code is made: the op answers, the cache stays consistent, and the
next call tries again what makes sense, when it makes sense."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fault_program
import pytest
import torch
from support import EAGER_OR_NATIVE, TAKES_VECTORS_FOR_GRANTED, assert_same, guarded_entries, outcome
from torch import Tensor

import dispatch_compile as dc
from dispatch_compile._compile.failure import may_pass

pytestmark = [pytest.mark.long, pytest.mark.run_once]

FOLDERS = "Inductor writes to the folders that the environment variables TORCHINDUCTOR_CACHE_DIR and TMPDIR name"


def table(mode: dc.DispatchCompileMode, op: dc.IrOp) -> Any:
    return mode.cache.table(op, op.impls["native"], mode.config)


def end_the_pause(mode: dc.DispatchCompileMode, op: dc.IrOp) -> None:
    """Come to the time when the next call tries again."""
    postponed = table(mode, op).postponed
    table(mode, op).postponed = replace(postponed, until=0.0)


def held(mode: dc.DispatchCompileMode, op: dc.IrOp) -> tuple[int, int]:
    """How many specializations the cache holds for the op, failures included, and how many guards in front of them."""
    return table(mode, op).size, len(table(mode, op).guarded)


# ---- Faults that pass


class BackendThatWrites:
    """A backend that writes to a file, which lies on a full device until that is mended."""

    def __init__(self, folder: Path) -> None:
        self.path, self.attempts = folder / "code", 0
        self.path.symlink_to("/dev/full")

    def mend(self) -> None:
        self.path.unlink()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> torch.fx.GraphModule:
        self.attempts += 1
        self.path.write_text(graph.code)
        return graph


@pytest.fixture
def writes(tmp_path: Path) -> BackendThatWrites:
    if not Path("/dev/full").exists():
        pytest.skip("has no device that is always full")
    return BackendThatWrites(tmp_path)


def test_what_may_pass_is_tried_again_and_not_at_every_call(writes, counted):
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend=writes, on_failure="native"))
    x = torch.randn(4, 3)
    with mode:
        with pytest.warns(dc.DispatchCompileWarning, match="now; later calls try again: .*No space left on device"):
            assert_same(counted(x), x * 2 + 1)
        for _ in range(5):
            assert_same(counted(x), x * 2 + 1)
            assert_same(counted(x.double()), x.double() * 2 + 1)
        assert writes.attempts == 1
        for attempts in (2, 3):
            delay = table(mode, counted.op).postponed.delay
            end_the_pause(mode, counted.op)
            counted(x)
            counted(x)
            assert writes.attempts == attempts
            assert table(mode, counted.op).postponed.delay == 2 * delay
        assert held(mode, counted.op) == (0, 0)
        end_the_pause(mode, counted.op)
        writes.mend()
        for _ in range(2):
            assert_same(counted(x), x * 2 + 1)
    assert mode.cache.stats() == dc.CacheStats(compiles=1, hits=2, fallbacks=15, asides=0)
    assert held(mode, counted.op) == (1, 1)
    assert table(mode, counted.op).postponed is None


def test_what_may_pass_is_raised_until_it_is_tried_again(writes, counted):
    mode, x = dc.DispatchCompileMode(config=dc.CompileConfig(backend=writes, on_failure="raise")), torch.randn(4, 3)
    with mode:
        errors = [outcome(counted, x) for _ in range(3)]
        assert {type(error) for error in errors} == {dc.CompileError}
        assert len({str(error) for error in errors}) == writes.attempts == 1
        assert isinstance(errors[0].__cause__, OSError)
        for named in ("'native'", counted.op.torch_op.name(), "No space left on device", "later calls try again"):
            assert named in str(errors[0])
        assert mode.explain(counted.op, x).raises
        writes.mend()
        end_the_pause(mode, counted.op)
        assert_same(counted(x), x * 2 + 1)
    assert mode.cache.stats() == dc.CacheStats(compiles=1, hits=1, fallbacks=3, asides=0)


def test_what_was_compiled_before_the_fault_goes_on(writes, counted):
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend=writes, on_failure="native"))
    x = torch.randn(4, 3)
    writes.mend()
    with mode:
        counted(x)
        writes.path.unlink()
        writes.path.symlink_to("/dev/full")
        with pytest.warns(dc.DispatchCompileWarning, match="No space left"):
            counted(x.double())
        counted(x)
    assert mode.cache.stats() == dc.CacheStats(compiles=1, hits=2, fallbacks=1, asides=0)


def test_a_cleared_cache_tries_again_at_once(writes, counted):
    mode, x = dc.DispatchCompileMode(config=dc.CompileConfig(backend=writes)), torch.randn(4, 3)
    with mode:
        outcome(counted, x)
        writes.mend()
        mode.cache.clear()
        assert_same(counted(x), x * 2 + 1)
    assert mode.cache.stats().hits == 1


def test_what_may_pass_is_tried_again_in_the_background(writes, counted):
    config = dc.CompileConfig(backend=writes, on_failure="native", on_new="background")
    mode, x = dc.DispatchCompileMode(config=config), torch.randn(4, 3)

    def call() -> None:
        assert_same(counted(x), x * 2 + 1)
        assert mode.cache.wait(60)

    with mode:
        call()
        with pytest.warns(dc.DispatchCompileWarning, match="now; later calls try again: .*No space left on device"):
            call()
        call()
        assert writes.attempts == 1
        writes.mend()
        end_the_pause(mode, counted.op)
        call()
        call()
    assert writes.attempts == 2
    assert mode.cache.stats() == dc.CacheStats(compiles=1, hits=1, fallbacks=4, asides=0)


def test_too_little_memory_for_the_op_itself(define_ir_op):
    def huge(x: Tensor) -> Tensor:
        return x.new_ones(2**50) if missing else x + 1

    op, x, missing = define_ir_op(huge), torch.randn(4, 3), True
    mode, eager = dc.DispatchCompileMode(config=EAGER_OR_NATIVE), outcome(op, x)
    assert isinstance(eager, RuntimeError)
    with mode:
        for _ in range(2):
            assert_same(outcome(op, x), eager)
            assert held(mode, op) == (0, 0)
        assert mode.cache.stats() == dc.CacheStats(compiles=0, hits=0, fallbacks=0, asides=0)
        missing = False
        assert_same(op(x), x + 1)
    assert mode.cache.stats() == dc.CacheStats(compiles=1, hits=1, fallbacks=0, asides=0)


def test_too_little_memory_to_compile(counted):
    """What the failed compilation holds is free when the op runs eagerly."""
    references: list[weakref.ref[Tensor]] = []

    def greedy(graph: torch.fx.GraphModule, inputs: list[Any]) -> torch.fx.GraphModule:
        tensor = torch.ones(1000)
        references.append(weakref.ref(tensor))
        torch.empty(2**50)
        return graph

    def native(x: Tensor) -> Tensor:
        in_native.append([reference() is None for reference in references])
        return original(x)

    config = dc.CompileConfig(backend=greedy, on_failure="raise")
    mode, x, in_native = dc.DispatchCompileMode(config=config), torch.randn(4, 3), []
    impl = counted.op.impls["native"]
    original, impl.func_impl_fn = impl.func_impl_fn, native
    gc.disable()
    try:
        with mode, pytest.raises(dc.CompileError, match="now; later calls try again: "):
            counted(x)
    finally:
        gc.enable()
        impl.func_impl_fn = original
    assert in_native[-1] == [True]
    assert held(mode, counted.op) == (0, 0)


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


MAY_PASS = [
    OSError(errno.ENOSPC, "No space left on device"),
    PermissionError(errno.EACCES, "Permission denied"),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("C++ compile error\n\ng++: fatal error: Killed signal terminated program cc1plus"),
    RuntimeError("BrokenProcessPool: A process in the process pool was terminated abruptly"),
    raised_from(RuntimeError("Inductor"), OSError(errno.EMFILE, "Too many open files")),
]
DO_NOT_PASS = [
    RuntimeError("C++ compile error\n\nkernel.cpp:1:1: error: expected unqualified-id"),
    RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448"),
    AssertionError(),
    ModuleNotFoundError("No module named 'triton'"),
]


@pytest.mark.parametrize("error", MAY_PASS, ids=repr)
def test_failures_that_may_pass(error):
    assert may_pass(error)


@pytest.mark.parametrize("error", DO_NOT_PASS, ids=repr)
def test_failures_that_do_not_pass(error):
    assert not may_pass(error)


# ---- Faults of the compiler that do not pass


def test_a_lowering_that_raises(define_ir_op, monkeypatch):
    from torch._inductor.lowering import lowerings

    def cubed(x: Tensor) -> Tensor:
        return torch.erf(x * 27.31831)  # code for it may not come from an earlier run

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal attempts
        attempts += 1
        raise AssertionError("no such lowering")

    attempts = 0
    monkeypatch.setitem(lowerings, torch.ops.aten.mul.Tensor, broken)
    op, x = define_ir_op(cubed), torch.randn(4, 3)
    expected = op(x)
    for on_failure in ("raise", "native"):
        attempts = 0
        mode = dc.DispatchCompileMode(config=dc.CompileConfig(on_failure=on_failure))
        with mode, warnings.catch_warnings():
            warnings.simplefilter("ignore", dc.DispatchCompileWarning)
            for _ in range(3):
                result = outcome(op, x)
                if on_failure == "raise":
                    assert isinstance(result, dc.CompileError)
                    assert f"{op.torch_op.name()} cannot be compiled with 'inductor': " in str(result)
                    assert "no such lowering" in str(result)
                else:
                    assert_same(result, expected)
        assert attempts == 1, "it is not tried again"
        assert mode.cache.stats() == dc.CacheStats(compiles=0, hits=0, fallbacks=3, asides=0)
        assert held(mode, op) == (1, 1)


def test_the_cpp_wrapper_is_refused(counted):
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(options={"cpp_wrapper": True}, on_failure="raise"))
    with mode, pytest.raises(dc.CompileError, match=r"set options=\{'cpp_wrapper': False\}$"):
        counted(torch.randn(4, 3))


# ---- In processes of their own, with Inductor

# As for users: the first that Inductor does is to compile something that tells what vector instructions there are.
TRIES_VECTORS = {TAKES_VECTORS_FOR_GRANTED: ""}


def result_of(program: str, *arguments: str, before: list[str] | None = None, **environment: str) -> Any:
    """What one of the programs printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [*(before or []), sys.executable, fault_program.__file__, program, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def counts(**nonzero: int) -> dict[str, int]:
    """What ``CacheStats`` holds, as a dict."""
    return dict.fromkeys(vars(dc.NativeCache().stats()), 0) | nonzero


def cannot_compile(cause: str) -> str:
    return (
        "the 'native' implementation of dispatch_compile::scaled cannot be compiled with 'inductor'"
        f"{cause}; it runs eagerly"
    )


def test_no_cpp_compiler(tmp_path):
    """It is looked for once: torch itself remembers that there is none."""
    told = result_of("fails", **TRIES_VECTORS, CXX="/nothing/here", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    (warning, second), stats, *held = told
    assert warning.startswith(cannot_compile(": InductorError: InvalidCxxCompiler: ").partition(";")[0])
    assert "/nothing/here" in warning
    assert "install g++, or name another C++ compiler by the environment variable CXX" in warning
    assert (second, stats, held) == ("native", counts(fallbacks=2), [1, 1])


def test_a_cpp_compiler_that_fails(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f"""#!/bin/sh
case "$*" in *-version*) exec {shutil.which("g++")} --version;; esac
echo "In file included from kernel.cpp:1:" >&2
echo "kernel.cpp:2:10: fatal error: Python.h: No such file or directory" >&2
exit 1
"""
    )
    compiler.chmod(0o755)
    told = result_of("fails", **TRIES_VECTORS, CXX=str(compiler), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    (warning, second), stats, *held = told
    assert "C++ compile error; kernel.cpp:2:10: fatal error: Python.h: No such file or directory" in warning
    assert (second, stats, held) == ("native", counts(fallbacks=2), [1, 1])


def test_a_file_where_the_cache_folder_should_be(tmp_path):
    """torch's compiler cannot be imported then, nor at a second attempt, which fails for another reason."""
    file = tmp_path / "file"
    file.touch()
    (warning, second), stats, *held = result_of("fails", TORCHINDUCTOR_CACHE_DIR=str(file))
    assert warning.startswith("dispatch_compile::scaled cannot be compiled: torch's compiler cannot be imported")
    assert str(file) in warning
    assert (second, stats, held) == ("native", counts(fallbacks=2), [1, 1])


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="needs a folder that not even root can write to")
def test_a_cache_folder_that_cannot_be_written(tmp_path):
    folder = {"TORCHINDUCTOR_CACHE_DIR": "/sys/kernel"}
    told = result_of("folder_that_cannot_be_written", str(tmp_path), **TRIES_VECTORS, **folder)
    (warning, *others), stats, *held = told
    assert warning.startswith(cannot_compile(" now; later calls try again: InductorError: ").partition(";")[0])
    assert "/sys/kernel" in warning
    assert FOLDERS in warning
    assert others == ["native", "native", "compiled", "compiled"]
    assert (stats, held) == (counts(compiles=1, hits=2, fallbacks=3), [1, 1])


def test_a_limit_on_the_size_of_files(tmp_path):
    (warning, *others), stats, *held = result_of("files_of_limited_size", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    cause = " now; later calls try again: InductorError: OSError: [Errno 27] File too large"
    assert warning == cannot_compile(f"{cause}; {FOLDERS}")
    assert others == ["native", "compiled", "compiled"]
    assert (stats, held) == (counts(compiles=1, hits=2, fallbacks=2), [1, 1])


@pytest.mark.parametrize(
    ("full", "when"),
    [
        ("TORCHINDUCTOR_CACHE_DIR", "at once"),
        ("TORCHINDUCTOR_CACHE_DIR", "when the C++ compiler starts"),
        ("TMPDIR", "at once"),
    ],
)
def test_a_full_disk(full, when, tmp_path):
    """A small tmpfs, which only the program sees, in place of Inductor's own folder or that of the C++ compiler."""
    small, other = tmp_path / "small", tmp_path / "other"
    small.mkdir()
    other.mkdir()
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(other), full: str(small)}
    mount = f'mount -t tmpfs -o size=1m tmpfs "{small}" && exec "$@"'
    before = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if not shutil.which("unshare") or subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not mount file systems")
    (warning, *others), stats, *held = result_of("full_disk", str(small), when, before=before, **folders)
    assert warning.startswith(cannot_compile(" now; later calls try again: InductorError: ").partition(";")[0])
    assert "No space left on device" in warning
    assert others[0] == others[2] == "native"
    assert others[3:] == ["compiled", "compiled"]
    assert (stats, held) == (counts(compiles=1, hits=2, fallbacks=4), [1, 1])


def test_ctrl_c(tmp_path):
    struck, (others, stats, *held) = result_of("interrupted", **TRIES_VECTORS, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert list(struck.values()) == [[["interrupted"], counts(), 0, 0]] * 4
    assert (others, stats, held) == (["compiled", "compiled"], counts(compiles=1, hits=2), [1, 1])


# ---- On a GPU


@contextmanager
def little_memory(bytes_left: int) -> Iterator[None]:
    """Between ``bytes_left`` and twice as many bytes of the GPU's memory can be had."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    taken = []
    try:
        while True:
            taken.append(torch.empty(bytes_left, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        taken.pop()
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        taken.clear()
        torch.cuda.empty_cache()


def first_sentence(error: BaseException) -> str:
    """Of CUDA's error: how much could not be had. The rest tells how much is taken, compiled code included."""
    return str(error).partition(". GPU")[0]


def runs_out_of_memory(call: Callable[[], Any]) -> str:
    with pytest.raises(torch.OutOfMemoryError) as error:
        call()
    sentence = first_sentence(error.value)
    del error
    gc.collect()
    return sentence


MIB = 2**20


@pytest.mark.cuda
@pytest.mark.fills_gpu
def test_a_first_call_that_runs_out_of_gpu_memory():
    mode, op = dc.DispatchCompileMode(), dc.ops.silu_and_mul
    with torch.inference_mode():
        x = torch.randn(2**15, 2**13, device="cuda", dtype=torch.bfloat16)  # 512 MiB, and the result 256 MiB
        with little_memory(64 * MIB):
            eager = runs_out_of_memory(lambda: op(x))
            with mode:
                for _ in range(2):
                    assert runs_out_of_memory(lambda: op(x)) == eager
            assert held(mode, op) == (0, 0)
            assert mode.cache.stats().fallbacks == mode.cache.stats().hits == 0
        with mode:
            torch.testing.assert_close(op(x), op(x.clone()))
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 2)


@pytest.mark.cuda
@pytest.mark.fills_gpu
def test_a_later_call_that_runs_out_of_gpu_memory():
    mode, op = dc.DispatchCompileMode(), dc.ops.silu_and_mul
    x = torch.randn(2**15, 2**13, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = op(x[:4])
        with mode:
            op(x[:4])
        with little_memory(64 * MIB):
            eager = runs_out_of_memory(lambda: op(x))
            with mode:
                for _ in range(2):
                    assert runs_out_of_memory(lambda: op(x)) == eager
        with mode:
            torch.testing.assert_close(op(x)[:4], expected, rtol=1.6e-2, atol=1e-3)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits, mode.cache.stats().fallbacks) == (1, 2, 0)
    assert len(guarded_entries(mode, op)) == 1


@pytest.mark.cuda
@pytest.mark.fills_gpu
def test_too_little_gpu_memory_to_tune():
    """The call itself needs next to nothing, but tuning runs the code on many tokens."""
    mode, op = dc.DispatchCompileMode(config=dc.CompileConfig(on_failure="native")), dc.ops.silu_and_mul
    x = torch.randn(4, 2**13, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = op(x)
        with mode, little_memory(48 * MIB):
            with pytest.warns(dc.DispatchCompileWarning, match="now; later calls try again: .*out of memory"):
                torch.testing.assert_close(op(x), expected, rtol=0, atol=0)
            torch.testing.assert_close(op(x), expected, rtol=0, atol=0)
        assert held(mode, op) == (0, 0)
        end_the_pause(mode, op)
        with mode:
            torch.testing.assert_close(op(x), expected, rtol=1.6e-2, atol=1e-3)
    assert mode.cache.stats() == dc.CacheStats(compiles=1, hits=1, fallbacks=2, asides=0)


@pytest.mark.cuda
def test_no_triton(tmp_path):
    (warning, second), stats, *held = result_of("fails_without_triton", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert "Cannot find a working triton installation" in warning
    assert "; install Triton; it runs eagerly" in warning
    assert (second, stats, held) == ("native", counts(fallbacks=2), [1, 1])
