"""Running a script as ``python SCRIPT`` or ``python -m MODULE`` does, in this process."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile
from types import TracebackType


@dataclass(frozen=True)
class Script:
    """What to run.

    Attributes:
        name: the path of a script, or the name of a module.
        is_module: which of them it is.
        arguments: its own.
    """

    name: str
    is_module: bool
    arguments: Sequence[str]

    def why_not_found(self) -> str | None:
        """What is wrong with the name; None if nothing is. Imports nothing, so a submodule may still be missing."""
        if not self.is_module:
            return None if os.path.exists(self.name) else f"there is no file {self.name!r}"
        package = self.name.partition(".")[0]
        found = package and importlib.util.find_spec(package)
        return None if found else f"there is no module {self.name!r}"

    def run(self) -> None:
        """Run it as ``__main__``, with ``sys.argv`` and ``sys.path[0]`` as Python sets them; they stay so."""
        sys.argv[:] = [self.name, *self.arguments]
        if self.is_module:  # sys.path[0] is the current folder: this process was started with -m as well
            runpy.run_module(self.name, run_name="__main__", alter_sys=True)
        else:
            if not getattr(sys.flags, "safe_path", False):  # since Python 3.11
                sys.path[0] = os.path.dirname(os.path.realpath(self.name))
            runpy.run_path(os.path.abspath(self.name), run_name="__main__")


def own_traceback(error: BaseException) -> TracebackType | None:
    """An error's traceback without the frames that start the script; None if they alone are in it."""
    traceback = error.__traceback__
    while traceback is not None and _starts_scripts(traceback.tb_frame.f_code.co_filename):
        traceback = traceback.tb_next
    return traceback


def own_call_site(stack: Sequence[str]) -> tuple[str, ...]:
    """A trace's ``FILE:LINE in FUNCTION`` lines, outermost first, without the frames that start the script."""
    return tuple(dropwhile(_starts_scripts, stack))


_STARTERS = (runpy.run_path.__code__.co_filename, os.path.dirname(__file__) + os.sep)  # runpy may be frozen


def _starts_scripts(file: str) -> bool:
    return file.startswith(_STARTERS)
