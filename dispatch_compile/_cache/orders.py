"""What a mode tells its routes for the time being."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType


@dataclass
class Orders:
    """Shared by a mode and its routes.

    Attributes:
        frozen: whether nothing is captured, compiled and loaded for calls of the mode.
    """

    frozen: bool = False


class Frozen:
    """What :meth:`DispatchCompileMode.freeze` returns: as a ``with`` block, it takes the freezing back at its end."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._before = orders.frozen
        orders.frozen = True

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._orders.frozen = self._before
