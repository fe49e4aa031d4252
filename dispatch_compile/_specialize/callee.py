"""What is called: an op, through torch's dispatcher, or a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .._dispatch import hooks
from .._torch.dispatch import OpOverload
from .arguments import Parameters


@dataclass(frozen=True)
class Callee:
    """What is called, as far as a call is concerned.

    Attributes:
        name: for people, ``ns::name`` or ``module.function``.
        full_name: the same with the overload's name, as in traces: ``ns::name.default``.
        parameters: how its arguments are read.
        run: ``run(keyset, args, kwargs)`` as if there were no mode.
        signature: of a function; None for an op.
    """

    name: str
    full_name: str
    parameters: Parameters
    run: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
    signature: inspect.Signature | None = None

    @property
    def is_function(self) -> bool:
        """Whether it is a function and not an op."""
        return self.signature is not None

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether these arguments fit its parameters; those of an op have been checked by the dispatcher."""
        if self.signature is None:
            return True
        try:
            self.signature.bind(*args[self.parameters.hidden :], **kwargs)
        except TypeError:
            return False
        return True

    @staticmethod
    def of(overload: OpOverload, parameters: Parameters) -> Callee:
        """An op, calls of which are caught on their way to its kernel."""

        def run(keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return hooks.redispatch(overload, keyset, args, kwargs)

        return Callee(overload.name(), full_name(overload), parameters, run)


_full_names: dict[str, str] = {}  # by what the overload calls itself: asking its schema takes a microsecond


def full_name(overload: OpOverload) -> str:
    """``ns::name.overload``, also of the default overload."""
    short = overload.name()
    name = _full_names.get(short)
    if name is None:
        name = _full_names[short] = f"{overload._schema.name}.{overload._overloadname}"
    return name
