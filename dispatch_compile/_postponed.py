"""Failures that may pass, as of a full disk: which ones they are, and when the next call tries again."""

from __future__ import annotations

import errno
import os
import time
import traceback
from dataclasses import dataclass

import torch

from ._torch_private import causes

# For how long nothing is tried after the first failure, in seconds. Each further one doubles it: a failing compilation,
# of seconds, takes ever less of the time, and once the fault is gone it is found out within as long as it lasted.
FIRST_DELAY = 5.0

_TYPES = (OSError, MemoryError, torch.OutOfMemoryError)

# What torch's allocator for the CPU, drivers, and compilers in processes of their own say in errors of other types; the
# last two of those that the system, or Ctrl-C, ends.
_TEXTS = (
    "out of memory",
    *map(os.strerror, (errno.ENOMEM, errno.ENOSPC, errno.EDQUOT)),
    "signal terminated program",
    "process pool was terminated abruptly",
)


@dataclass(frozen=True)
class Postponed:
    """A failure that may pass.

    Attributes:
        failure: what it was, for people.
        delay: for how long nothing is tried, in seconds.
        until: when that is over, by ``time.monotonic()``.
    """

    failure: str
    delay: float
    until: float

    @staticmethod
    def after(failure: str, previous: Postponed | None) -> Postponed:
        """A failure just now, after others or as the first."""
        delay = FIRST_DELAY if previous is None else 2 * previous.delay
        return Postponed(failure, delay, time.monotonic() + delay)

    @property
    def is_over(self) -> bool:
        """Whether it is time to try again."""
        return time.monotonic() >= self.until


def may_pass(error: BaseException) -> bool:
    """Whether an error is of what the machine lacks now and may have later: memory, room on a disk, files."""
    return any(isinstance(one, _TYPES) or any(text in str(one) for text in _TEXTS) for one in causes(error))


def free_memory_of(error: BaseException) -> None:
    """Let go of the tensors that frames in an error's traceback hold; what runs next may need their memory."""
    for one in causes(error):
        traceback.clear_frames(one.__traceback__)
