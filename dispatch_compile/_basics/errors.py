"""Errors and warnings that callers of the package may want to catch by type."""

from __future__ import annotations

import logging
import warnings


def first_line(error: BaseException) -> str:
    """An error in one line: its type and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


_log = logging.getLogger("dispatch_compile")


class CompileError(RuntimeError):
    """Raised by a call that cannot run compiled, where the configuration asks for an error instead of an eager run.

    There are three causes:

    - ``CompileConfig(on_failure="raise")``, and the implementation could not be captured or compiled;
    - ``CompileConfig(on_new="raise")``, and the call needs new code;
    - a reference given to :func:`register_native` has other results than its op.

    The text names the op, the implementation and the cause:

    >>> mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", on_new="raise"))
    >>> with mode:
    ...     dc.ops.silu_and_mul(torch.ones(8, 256))
    Traceback (most recent call last):
    dispatch_compile._basics.errors.CompileError: there is no code of the 'native' implementation of
    dispatch_compile::silu_and_mul for this call, and the mode is to make none. Add to the warm-up:
    mode.warmup('dispatch_compile::silu_and_mul', t: f32[8, 256])
    """


class DispatchCompileWarning(UserWarning):
    """Warns that calls run slower than they could, or differently than asked; once per implementation and cause.

    The same text is logged by the logger ``dispatch_compile``. To have tests fail where something does not run
    compiled, make it an error (in ``pytest.ini``: ``filterwarnings = error::dispatch_compile.DispatchCompileWarning``):

    >>> import warnings
    >>> mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", on_new="native"))
    >>> with warnings.catch_warnings(), mode:
    ...     warnings.simplefilter("error", dc.DispatchCompileWarning)
    ...     dc.ops.silu_and_mul(torch.ones(8, 256))
    Traceback (most recent call last):
    dispatch_compile._basics.errors.DispatchCompileWarning: there is no code of the 'native' implementation of ...
    It runs eagerly
    """


def warn(text: str, stacklevel: int = 2) -> None:
    """Log and issue a :class:`DispatchCompileWarning`; ``stacklevel`` as for :func:`warnings.warn`."""
    _log.warning("%s", text)
    warnings.warn(text, DispatchCompileWarning, stacklevel=stacklevel)
