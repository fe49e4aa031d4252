"""For tests of your own ops: that what runs compiled today still does tomorrow. Needs ``expecttest``."""

from __future__ import annotations

from collections.abc import Callable

from ._basics.checks import check_plain
from ._mode import DispatchCompileMode, current_mode


def assert_expected_trace(
    fn: Callable[[], object], expected: str, *, mode: DispatchCompileMode | None = None, skip: int = 0
) -> None:
    """Run ``fn`` inside a mode, and compare what is done with each call with a golden text::

        assert_expected_trace(lambda: expert(x, w), \"""\"\""")

    ``EXPECTTEST_ACCEPT=1 pytest`` then writes the text into the test file, and whenever it changes. Write the call as
    a statement of its own, with ``expected`` as its first triple-quoted string.

    Args:
        fn: makes the calls; an error that it raises is passed on.
        expected: the text of the :class:`Trace` of these calls.
        mode: the mode to run in; it need not trace. By default the one entered by the caller, or else a new one, in
            which all code is new.
        skip: how many callers there are between the one that wrote ``expected`` and this function, as in expecttest.

    Raises:
        AssertionError: the texts differ; the message shows how.
        ImportError: expecttest is not installed.
        TypeError: an argument of the wrong type.
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
