"""Errors and warnings that callers of the package may want to catch by type."""


class CompileError(RuntimeError):
    """An implementation could not be captured or compiled, and ``on_failure="raise"``."""


class DispatchCompileWarning(UserWarning):
    """A call runs slower than it could, or not as asked: said once per implementation and cause."""
