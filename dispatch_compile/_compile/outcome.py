"""Why a call does not run compiled code.

There are three ways. The call steps aside: compiled code is not for it. It runs eagerly: there is no code for it now.
Its code failed, for good or for now. In each the op runs as it would without the mode.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .config import RAISE, CompileConfig
from .failure import CannotCompile, CannotCompileNow, WrongReference


@dataclass(frozen=True)
class Aside:
    """Compiled code is not for this call: for its arguments, its provider, the thread's state, or for what the
    implementation does beside computing."""

    reason: str


@dataclass(frozen=True)
class Eager:
    """There is no code for this call now, through no fault.

    Attributes:
        reason: :data:`FROZEN`, :data:`IN_BACKGROUND`, ...
        raises: whether the call raises in place of running eagerly.
    """

    reason: str
    raises: bool = False


@dataclass(frozen=True)
class Failed:
    """Code for this call could not be made.

    Attributes:
        reason: names the op, the implementation and the cause.
        raises: whether calls raise :class:`CompileError` in place of running eagerly.
        for_now: whether a later call tries again.
        cause: the compiler's error; None in what is kept.
    """

    reason: str
    raises: bool
    for_now: bool = False
    cause: BaseException | None = None

    @staticmethod
    def of(error: CannotCompile, config: CompileConfig) -> Failed:
        """The outcome of an error, under a configuration."""
        raises = config.on_failure == RAISE or isinstance(error, WrongReference)
        return Failed(str(error), raises, isinstance(error, CannotCompileNow), error.__cause__)

    def told(self) -> Failed:
        """The same without the cause, whose traceback refers to the implementation."""
        return replace(self, cause=None)


FROZEN = "frozen"
IN_BACKGROUND = "is being compiled in the background"
IN_CUDA_GRAPH = "not compiled yet, and a CUDA graph is being captured"
IN_FORK = "the process was forked while another thread compiled"
INSIDE_CHANGED = "the dispatch of the ops inside changed while it was compiled"
OTHER_SETTINGS = "not compiled in the background, where torch's settings are others than in the call"
