"""When a call tries again to make code, after a failure for now."""

from __future__ import annotations

import time
from dataclasses import dataclass

from .._compile.outcome import Failed

# For how long nothing is tried after the first failure, in seconds. Each further one doubles it: a failing compilation,
# of seconds, takes ever less of the time, and once the fault is gone it is found out within as long as it lasted.
FIRST_DELAY = 5.0


@dataclass(frozen=True)
class Postponed:
    """A failure that may pass.

    Attributes:
        failure: what it was.
        delay: for how long nothing is tried, in seconds.
        until: when that is over, by ``time.monotonic()``.
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
