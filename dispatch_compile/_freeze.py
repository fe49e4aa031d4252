"""Serving without making anything: whether a mode may capture, compile and load."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType


@dataclass
class Freeze:
    """Shared by a mode and its routes.

    Attributes:
        on: whether nothing is made for calls of the mode.
    """

    on: bool = False


class Frozen:
    """What :meth:`DispatchCompileMode.freeze` returns: as a ``with`` block, it takes the freezing back at its end."""

    def __init__(self, freeze: Freeze) -> None:
        self._freeze = freeze
        self._before = freeze.on
        freeze.on = True

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._freeze.on = self._before
