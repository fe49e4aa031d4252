"""Exponential backoff: when a call tries again to compile, after a transient failure."""

from __future__ import annotations

import time
from dataclasses import dataclass

from .._compile.outcome import Failed

# For how long nothing is tried after the first failure, in seconds. Each further failure doubles it. So compilations
# that fail, which take seconds each, take ever less of the time. After the fault ends, compiling resumes within as much
# time as the fault lasted.
FIRST_DELAY = 5.0


@dataclass(frozen=True)
class Postponed:
    """A transient failure.

    Attributes:
        failure: what it was.
        delay: for how long nothing is tried, in seconds.
        until: when that time ends, by ``time.monotonic()``.
    """

    failure: Failed
    delay: float
    until: float

    @staticmethod
    def after(failure: Failed, previous: Postponed | None) -> Postponed:
        """A failure just now, after others or as the first."""
        delay = FIRST_DELAY if previous is None else 2 * previous.delay
        return Postponed(failure, delay, time.monotonic() + delay)

    @property
    def is_over(self) -> bool:
        """Whether it is time to try again."""
        return time.monotonic() >= self.until
