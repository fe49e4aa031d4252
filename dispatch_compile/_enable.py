"""The mode for a whole process."""

from __future__ import annotations

from typing import Any

from ._dispatch.active import EVERY_OP, mode_everywhere, set_mode_everywhere
from ._mode import DispatchCompileMode


def enable(mode: DispatchCompileMode | None = None, **mode_arguments: Any) -> DispatchCompileMode:
    """Put the whole process in a mode: every thread, also those that start later, and every task, wherever it is in no
    mode of its own.

    A mode that is entered takes its place there, and does not nest in it. Child processes enable it for themselves.
    The ops of ``vllm.ir`` are looked for now, and again by another ``enable()``; all others are caught as they come.

    Args:
        mode: the mode; by default a new one.
        mode_arguments: the arguments of :class:`DispatchCompileMode` for a new one.

    Returns:
        The mode. While one is enabled, ``enable()`` without arguments returns that one.

    Raises:
        RuntimeError: another mode is enabled.
        ValueError: the mode's trace records every op, for which it would have to be on each thread's own stack.
        TypeError: both a mode and arguments for one are given, or ``mode`` is none.
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
    """Undo :func:`enable`; nothing if no mode is enabled."""
    set_mode_everywhere(None)
