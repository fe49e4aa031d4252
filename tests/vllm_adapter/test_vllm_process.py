"""One line, or one environment variable, for a process that runs a vLLM worker."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="needs the real vLLM")

import torch
import vllm.ir
from support import EAGER
from torch import Tensor
from vllm_support import OpaqueOps, SiluAndMul, made, set_current_vllm_config, silu_and_mul, vllm_config

import dispatch_compile as dc
from dispatch_compile.vllm import _settings

pytestmark = pytest.mark.vllm

LAYERS: dict[str, torch.nn.Module] = {}


@pytest.fixture(autouse=True)
def as_before():
    _settings.say_once.cache_clear()
    _settings.log_once.cache_clear()
    with vllm.ir.enable_torch_wrap(True), vllm.ir.ops.rms_norm.set_priority(["native"]):
        yield
    dc.vllm.disable()


@pytest.fixture(scope="module")
def block():
    """An opaque op that calls an IR op and a layer."""
    ops = OpaqueOps("test_vllm_process")

    def norm_and_activate(x: Tensor) -> Tensor:
        return LAYERS["activation"](vllm.ir.ops.rms_norm(x, None, 1e-6))

    yield ops.register(norm_and_activate)
    ops.remove()


def test_after_one_line_ir_ops_and_layers_run_compiled(block):
    before = made(silu_and_mul)
    enabled = dc.vllm.enable(EAGER)
    after = made(silu_and_mul)
    for calls, layer in enumerate((before, after), start=1):
        LAYERS["activation"] = layer
        x = torch.randn(4, 8)
        torch.testing.assert_close(
            block(x), SiluAndMul.forward_native(vllm.ir.ops.rms_norm.impls["native"].impl_fn(x, None, 1e-6))
        )
        assert (enabled.cache.stats().compiles, enabled.cache.stats().hits) == (2, 2 * calls)


def test_both_overloads_are_caught_and_the_priority_decides():
    op = vllm.ir.ops.fused_add_rms_norm
    enabled = dc.vllm.enable(EAGER)
    args = torch.randn(4, 8), torch.randn(4, 8), None, 1e-6
    with op.set_priority(["native"]):
        op(*args)
        op.maybe_inplace(*(value.clone() if isinstance(value, Tensor) else value for value in args))
    assert enabled.cache.stats().hits == 2


def test_on_every_thread(block):
    LAYERS["activation"] = made(silu_and_mul)
    enabled = dc.vllm.enable(EAGER)
    results = []

    def microbatch():
        results.append(block(torch.randn(4, 8)))

    for _ in range(2):
        thread = threading.Thread(target=microbatch)
        thread.start()
        thread.join()
    assert len(results) == 2
    assert enabled.cache.stats().hits == 4


def test_a_mode_of_the_thread_goes_first(block):
    LAYERS["activation"] = made(silu_and_mul)
    enabled = dc.vllm.enable(EAGER)
    with dc.DispatchCompileMode(config=EAGER, trace=True) as mode:
        block(torch.randn(4, 8))
    assert [event.action for event in mode.trace.events] == ["compiled", "compiled"]
    assert enabled.cache.stats().hits == 0


def test_disabling_undoes_it(block):
    call, call_inplace = vars(vllm.ir.op.IrOp)["__call__"], vars(vllm.ir.op.IrOpInplaceOverload)["__call__"]
    layer = LAYERS["activation"] = made(silu_and_mul)
    method = layer._forward_method
    enabled = dc.vllm.enable(EAGER)
    assert layer._forward_method is not method
    dc.vllm.disable()
    dc.vllm.disable()
    vllm.ir.ops.rms_norm(torch.randn(4, 8), None, 1e-6)
    assert enabled.cache.stats().hits == 0
    assert layer._forward_method is method
    assert vars(vllm.ir.op.IrOp)["__call__"] is call
    assert vars(vllm.ir.op.IrOpInplaceOverload)["__call__"] is call_inplace


def test_enabling_again_gives_the_same_mode():
    enabled = dc.vllm.enable(EAGER)
    assert dc.vllm.enable(dc.CompileConfig(backend="eager", on_failure="raise")) is enabled
    with pytest.raises(RuntimeError, match=r"another config is enabled; call disable\(\)"):
        dc.vllm.enable()
    dc.vllm.disable()
    assert dc.vllm.enable() is not enabled


def test_ir_ops_in_a_compiled_model_stay_whole(block):
    enabled = dc.vllm.enable(EAGER)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda x: vllm.ir.ops.rms_norm(x + 1, None, 1e-6), fullgraph=True, backend=backend)(torch.randn(4, 8))
    [graph] = graphs
    assert "torch.ops.vllm_ir.rms_norm" in graph.code
    assert enabled.cache.stats().asides == 0


# ---- Torch wrapping.


def test_enabling_says_once_that_torch_wrapping_is_off():
    with vllm.ir.enable_torch_wrap(False):
        with pytest.warns(dc.DispatchCompileWarning, match="ir_enable_torch_wrap=True"):
            enabled = dc.vllm.enable(EAGER)
        vllm.ir.ops.rms_norm(torch.randn(4, 8), None, 1e-6)  # warns no more: warnings of this kind are errors here
    assert enabled.cache.stats().hits == 0


def test_a_call_says_once_that_torch_wrapping_was_switched_off_later():
    dc.vllm.enable(EAGER)
    with vllm.ir.enable_torch_wrap(False):
        with pytest.warns(dc.DispatchCompileWarning, match="set_default_torch_wrap"):
            vllm.ir.ops.rms_norm(torch.randn(4, 8), None, 1e-6)
        vllm.ir.ops.rms_norm(torch.randn(4, 8), None, 1e-6)


# ---- Compilation off.


@pytest.mark.parametrize(
    ("config", "eager", "reason"),
    [
        ({"mode": "NONE"}, False, "mode is NONE"),
        ({"mode": "NONE"}, True, "enforce_eager is set"),
        ({"backend": "eager"}, False, "backend is 'eager'"),
    ],
    ids=["mode", "enforce_eager", "backend"],
)
def test_it_does_nothing_and_says_so_when_compilation_is_off(caplog, config, eager, reason):
    vllms_own = vars(vllm.ir.op.IrOp)["__call__"]
    config = vllm_config(**config)
    if eager:  # what vLLM makes of it is mode NONE; a model's whole configuration is not needed here
        object.__setattr__(config, "model_config", SimpleNamespace(enforce_eager=True))
    with set_current_vllm_config(config), caplog.at_level(logging.WARNING, "dispatch_compile"):
        assert dc.vllm.enable(EAGER) is None
    assert reason in caplog.text
    assert vars(vllm.ir.op.IrOp)["__call__"] is vllms_own


def test_layers_made_later_with_compilation_off_are_left_alone_and_the_log_says_so_once(caplog):
    enabled = dc.vllm.enable(EAGER)
    with caplog.at_level(logging.WARNING, "dispatch_compile"):
        for _ in range(2):
            made(silu_and_mul, vllm_config(mode="NONE"))(torch.randn(4, 8))
    assert caplog.text.count("mode is NONE; CustomOp layers stay as vLLM makes them") == 1
    assert enabled.cache.stats().hits == 0


# ---- The plugin.

ROOT = Path(__file__).parents[2]
ON = "DISPATCH_COMPILE_VLLM"
WORKERS = """
import json, logging, os, sys, traceback
import torch, vllm.plugins, vllm.ir

def worker(mode_of_vllm):
    logging.basicConfig(level=logging.WARNING)
    vllm.plugins.load_general_plugins()
    from vllm_support import made, silu_and_mul, vllm_config
    import dispatch_compile as dc
    from dispatch_compile._dispatch.active import mode_everywhere
    mode = mode_everywhere()
    if mode is not None:
        made(silu_and_mul, vllm_config(mode_of_vllm))(torch.randn(4, 8))
    print("calls", mode and mode.cache.stats().hits)

folder, workers = sys.argv[1], json.loads(sys.argv[2])
for number, (environment, mode_of_vllm) in enumerate(workers):
    child = os.fork()
    if child == 0:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(f"{folder}/{stream.name[1:-1]}{number}", os.O_WRONLY | os.O_CREAT), stream.fileno())
        os.environ.update(environment)
        try:
            worker(mode_of_vllm)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.waitpid(child, 0)
"""
STARTED = {
    "on, and traced": ({ON: "1", "DISPATCH_COMPILE_TRACE": "1"}, "STOCK_TORCH_COMPILE"),
    "off": ({ON: "0"}, "STOCK_TORCH_COMPILE"),
    "not among the plugins that are wanted": ({ON: "1", "VLLM_PLUGINS": "other"}, "STOCK_TORCH_COMPILE"),
    "among them, with compilation off": ({ON: "1", "VLLM_PLUGINS": "other,dispatch_compile"}, "NONE"),
}


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """What each of the workers printed, and logged. They are children of a process that has only imported vLLM, for
    that takes long."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    folder = tmp_path_factory.mktemp("workers")
    with open(ROOT / "pyproject.toml", "rb") as file:
        groups = tomllib.load(file)["project"]["entry-points"]
    metadata = folder / "dispatch_compile-0.dist-info"  # as an installation makes it
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: dispatch_compile\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "\n".join(
            line
            for group, entries in groups.items()
            for line in (f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()))
        )
    )
    path = [str(folder), str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, "-c", WORKERS, str(folder), json.dumps(list(STARTED.values()))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return {
        name: tuple((folder / f"{stream}{number}").read_text() for stream in ("stdout", "stderr"))
        for number, name in enumerate(STARTED)
    }


@pytest.mark.parametrize(
    ("worker", "output", "log"),
    [
        ("on, and traced", "calls 1", "vllm_custom_op::silu_and_mul("),
        ("off", "calls None", ""),
        ("not among the plugins that are wanted", "calls None", ""),
        ("among them, with compilation off", "calls 0", "vLLM's compilation is off: compilation_config.mode is NONE"),
    ],
)
def test_vllms_plugin_loader_enables_it_if_the_environment_says_so(worker, output, log, workers):
    stdout, stderr = workers[worker]
    assert stdout.splitlines()[-1:] == [output], stderr
    assert log in stderr
