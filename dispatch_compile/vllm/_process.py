"""All of it for a process that runs a vLLM worker, in one line or by an environment variable."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import torch

from .._config import CompileConfig
from .._mode import DispatchCompileMode, current_mode
from . import _default_mode
from ._custom_ops import catch_custom_ops
from ._required import missing, required
from ._settings import compilation_off, log, warn_if_not_wrapped

ENVIRONMENT_VARIABLE = "DISPATCH_COMPILE_VLLM"
_PURPOSE = "catch its IR ops on every thread"
_enabled = ExitStack()  # what disable() undoes


def enable(config: CompileConfig | None = None) -> DispatchCompileMode | None:
    """Run vLLM's IR ops and ``CustomOp`` layers compiled in this process, wherever torch.compile does not see them.

    Call it in the process that runs the model, before or after the model is made. A mode belongs to a thread, but vLLM
    may run a model on others than the one that calls this: on one for each microbatch, or on an executor's. And the
    bodies of opaque ops cannot be wrapped once they are registered. So the mode is entered where each call starts, in
    the layer or the op, if its thread is in no mode; a mode that you enter yourself goes first.

    Args:
        config: how to compile; :class:`CompileConfig` has the defaults.

    Returns:
        The mode; its ``cache.stats()`` tells what became of the calls. None if the current vLLM configuration has
        compilation off, as ``enforce_eager`` does: then nothing is done, and the log says so.

    Raises:
        ImportError: vLLM is not installed.
        RuntimeError: it is enabled already with another configuration; or this vLLM has changed, and the text says how.
    """
    config = config or CompileConfig()
    enabled = _default_mode.mode
    if enabled is not None:
        if enabled.config != config:
            raise RuntimeError("dispatch_compile.vllm is enabled with another config; call disable() first")
        return enabled
    reason = compilation_off()
    if reason is not None:
        log.warning("dispatch_compile.vllm.enable() does nothing: %s", reason)
        return None
    mode = DispatchCompileMode(config=config)
    with ExitStack() as undo:
        undo.callback(catch_custom_ops().remove)
        _catch_ir_ops(undo)
        _enabled.push(undo.pop_all())
    _default_mode.mode = mode
    log.info("vLLM's IR ops and CustomOp layers run compiled where torch.compile does not see them")
    return mode


def disable() -> None:
    """Undo :func:`enable`; nothing if it is not enabled. What was compiled is freed with the mode."""
    _default_mode.mode = None
    _enabled.close()


def plugin() -> None:
    """The entry point in vLLM's group ``vllm.general_plugins``: :func:`enable` if ``DISPATCH_COMPILE_VLLM`` is 1.

    vLLM loads its plugins before it has a configuration. Where that turns out to have compilation off, the layers are
    left alone, and the log says so.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE) == "1":
        enable()


def _catch_ir_ops(undo: ExitStack) -> None:
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
        kind.__call__ = _in_default_mode(kind.__call__, module)


def _in_default_mode(call: Callable[..., Any], module: ModuleType) -> Callable[..., Any]:
    @functools.wraps(call)
    def call_in_mode(op: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or current_mode() is not None:
            return call(op, *args, **kwargs)
        mode = _default_mode.mode
        if mode is None:
            return call(op, *args, **kwargs)
        warn_if_not_wrapped(module)
        with mode:
            return call(op, *args, **kwargs)

    return call_in_mode
