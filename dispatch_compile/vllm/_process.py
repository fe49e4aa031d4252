"""All of it for a process that runs a vLLM worker, in one line or by an environment variable."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import torch

from .. import _enable as process
from .._compile.config import CompileConfig
from .._dispatch.active import mode_everywhere
from .._ir.protocol import Op
from .._mode import DispatchCompileMode
from ._custom_ops import catch_custom_ops
from ._required import missing, required
from ._settings import compilation_off, log, warn_if_not_wrapped

ENVIRONMENT_VARIABLE = "DISPATCH_COMPILE_VLLM"
_PURPOSE = "catch its IR ops on every thread"
_undo: ExitStack | None = None  # what disable() does, after enable()
_enabled: DispatchCompileMode | None = None  # the process's mode, if enable() has put it there


def enable(config: CompileConfig | None = None) -> DispatchCompileMode | None:
    """Run vLLM's IR ops and ``CustomOp`` layers compiled in this process, wherever ``torch.compile`` does not see them.

    Call it in the process that runs the model, before or after the model is made. ``DISPATCH_COMPILE_VLLM=1`` in the
    environment does the same in each worker.

    >>> import vllm.ir
    >>> mode = dc.vllm.enable(dc.CompileConfig(backend="eager"))
    >>> with vllm.ir.enable_torch_wrap(True):  # as vLLM does where it compiles models, on a GPU by default
    ...     y = vllm.ir.ops.rms_norm(torch.ones(8, 64), None, 1e-6)
    >>> mode.cache.stats().hits
    1
    >>> dc.vllm.disable()

    It combines :func:`dispatch_compile.enable`, since vLLM may run a model on other threads than the one that calls
    this (one for each microbatch, or an executor's), and :func:`catch_custom_ops`. On a thread that has entered a mode
    of its own, that mode decides.

    Args:
        config: how to compile; :class:`CompileConfig` has the defaults.

    Returns:
        The mode; its ``cache.stats()`` says what became of the calls. None if the current vLLM configuration has
        compilation off, as ``enforce_eager`` has: then nothing is changed, and the log says so.

    Raises:
        ImportError: vLLM is not installed.
        RuntimeError: a mode with another configuration is enabled; or this version of vLLM lacks an attribute that is
            needed (the text names it).
        ValueError: ``DISPATCH_COMPILE_TRACE`` is not 1, 0 or empty.
    """
    global _enabled, _undo
    config = config or CompileConfig()
    mode = mode_everywhere()
    if mode is not None and mode.config != config:
        raise RuntimeError("dispatch_compile.vllm.enable: a mode with another config is enabled; call disable() first")
    reason = compilation_off()
    if reason is not None:
        log.warning("dispatch_compile.vllm.enable() does nothing: %s", reason)
        return None
    if _undo is None:
        with ExitStack() as undo:
            undo.callback(catch_custom_ops().remove)
            _watch_ir_ops(undo)
            _undo = undo.pop_all()
        log.info("vLLM's IR ops and CustomOp layers run compiled where torch.compile does not see them")
    if mode is None:
        mode = _enabled = process.enable(config=config)
    return mode


def disable() -> None:
    """Undo :func:`enable`: layers and ops are again as vLLM made them. Harmless when it is not enabled.

    The compiled code is freed with the mode.

    >>> mode = dc.vllm.enable(dc.CompileConfig(backend="eager"))
    >>> dc.vllm.disable()
    """
    global _enabled, _undo
    if _enabled is not None and mode_everywhere() is _enabled:
        process.disable()
    if _undo is not None:
        _undo.close()
    _enabled = _undo = None


def plugin() -> None:
    """The entry point in vLLM's group ``vllm.general_plugins``: :func:`enable` if ``DISPATCH_COMPILE_VLLM`` is 1.

    vLLM loads its plugins before it has a configuration. Where that turns out to have compilation off, the layers are
    left alone, and the log says so.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE) == "1":
        enable()


def _watch_ir_ops(undo: ExitStack) -> None:
    try:
        from vllm.ir import op as module
    except ImportError:
        log.info("this vLLM has no vllm.ir; only its CustomOp layers are caught")
        return
    warn_if_not_wrapped(module)
    for name in ("IrOp", "IrOpInplaceOverload"):
        kind = required(module, name, _PURPOSE)
        if "__call__" not in vars(kind):
            raise missing(kind, "__call__", _PURPOSE)
        undo.callback(setattr, kind, "__call__", kind.__call__)
        kind.__call__ = _watched(kind.__call__, module)


def _watched(call: Callable[..., Any], module: ModuleType) -> Callable[..., Any]:
    """The same, with an eye on what nothing tells of: new ops in vLLM's registry, and its torch wrapping."""

    @functools.wraps(call)
    def watched_call(op: Op, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            mode = mode_everywhere()
            if mode is not None:
                warn_if_not_wrapped(module)
                mode.look_for_ops()
        return call(op, *args, **kwargs)

    return watched_call
