"""The mode for a whole process."""

from __future__ import annotations

from typing import Any

from ._dispatch.active import EVERY_OP, mode_everywhere, set_mode_everywhere
from ._mode import DispatchCompileMode


def enable(mode: DispatchCompileMode | None = None, **mode_arguments: Any) -> DispatchCompileMode:
    """Put the whole process in a mode: every thread and every task, also those that start later.

    Use it where the threads that make the calls are not yours to start. A thread or task that has entered a mode of its
    own is in that one instead.

    >>> from threading import Thread
    >>> mode = dc.enable(config=dc.CompileConfig(backend="eager"))
    >>> thread = Thread(target=dc.ops.silu_and_mul, args=(torch.ones(8, 256),))
    >>> thread.start(), thread.join()
    (None, None)
    >>> dc.disable()
    >>> mode.cache.stats().hits
    1

    Child processes must enable it themselves. The ops of ``vllm.ir`` are looked for now, and again by each further
    ``enable()``; other ops are caught as soon as they are registered.

    Args:
        mode: the mode; by default a new one.
        mode_arguments: the arguments of :class:`DispatchCompileMode` for a new one.

    Returns:
        The mode. While one is enabled, ``enable()`` without arguments returns that one.

    Raises:
        RuntimeError: another mode is enabled.
        ValueError: the mode's trace records every op (``Trace(all_ops=True)``), which works only on the thread that
            enters the mode; or as :class:`DispatchCompileMode` raises.
        TypeError: both a mode and arguments for a new one are given, or ``mode`` is not a mode; or as
            :class:`DispatchCompileMode` raises.
    """
    if mode is not None and not isinstance(mode, DispatchCompileMode):
        raise TypeError(f"enable: mode must be a DispatchCompileMode, not {mode!r}")
    if mode is not None and mode_arguments:
        raise TypeError(f"enable: give a mode, or arguments for a new one ({', '.join(mode_arguments)}), not both")
    enabled = mode_everywhere()
    if enabled is not None and (mode_arguments or mode not in (None, enabled)):
        raise RuntimeError("enable: another mode is enabled; call disable() first")
    mode = mode or enabled or DispatchCompileMode(**mode_arguments)
    if mode.interception == EVERY_OP:
        raise ValueError("enable: Trace(all_ops=True) is for the thread that enters the mode; trace without all_ops")
    mode.look_for_ops()
    set_mode_everywhere(mode)
    return mode


def disable() -> None:
    """Undo :func:`enable`, at the end of a test or before another mode is enabled. Harmless when no mode is enabled.

    The compiled code stays in the mode's cache.

    >>> mode = dc.enable()
    >>> dc.disable()
    >>> dc.enable(mode) is mode
    True
    >>> dc.disable()
    """
    set_mode_everywhere(None)
