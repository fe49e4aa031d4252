"""For tests of your own ops: check that what runs compiled today still does tomorrow. Needs ``expecttest``."""

from __future__ import annotations

from collections.abc import Callable

from ._basics.checks import check_plain
from ._mode import DispatchCompileMode, current_mode


def assert_expected_trace(
    fn: Callable[[], object], expected: str, *, mode: DispatchCompileMode | None = None, skip: int = 0
) -> None:
    """Run a function inside a mode, and compare the trace of its calls with a text that is kept in the test.

    Such a golden test fails when a call no longer runs compiled, is recompiled more often, or is fused differently.

    >>> from dispatch_compile.testing import assert_expected_trace
    >>> mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"))
    >>> assert_expected_trace(
    ...     lambda: dc.ops.silu_and_mul(torch.ones(8, 256)),
    ...     "dispatch_compile::silu_and_mul(t: f32[8, 256])  ->  t: f32[8, 128]  # compiled native, new: [s0, 256]",
    ...     mode=mode,
    ... )

    You need not write the text. Write the call as a statement of its own, with an empty triple-quoted string as
    ``expected``. ``EXPECTTEST_ACCEPT=1 pytest`` fills it in, and updates it after a change that you accept.

    Args:
        fn: makes the calls.
        expected: the text of the :class:`Trace` of these calls. For ``EXPECTTEST_ACCEPT`` it must be the first
            triple-quoted string of the statement.
        mode: the mode to run in; it need not trace. By default the mode that the caller is in, or else a new one, in
            which all code is new.
        skip: how many functions stand between the test that wrote ``expected`` and this call; 0 where the test calls
            this function itself.

    Raises:
        AssertionError: the texts differ; the message shows how.
        ImportError: expecttest is not installed.
        TypeError: an argument of the wrong type.
        Exception: whatever ``fn`` raises.
    """
    __tracebackhide__ = True  # pytest shows the test's line
    check_plain(fn, "assert_expected_trace")
    if not isinstance(expected, str):
        raise TypeError(f"assert_expected_trace: expected must be text, not {expected!r}")
    if mode is not None and not isinstance(mode, DispatchCompileMode):
        raise TypeError(f"assert_expected_trace: mode must be a DispatchCompileMode, not {mode!r}")
    try:
        from expecttest import assert_expected_inline
    except ImportError as error:
        raise ImportError(
            "assert_expected_trace: expecttest is needed: pip install dispatch-compile[test]", name=error.name
        ) from error
    mode = mode or current_mode() or DispatchCompileMode()
    watcher = DispatchCompileMode(ops=(), trace=True)  # catches nothing, but records what happens inside it
    with watcher, mode:
        fn()
    assert_expected_inline(str(watcher.trace), expected, skip=1 + skip)
