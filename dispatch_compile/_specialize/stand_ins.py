"""Objects among the arguments of a capture: stand-ins that notice what an implementation reads of them.

What it reads becomes a leaf of the arguments: a tensor is an input, a constant is guarded. What is read is known only
once the implementation has run, so a capture in which more is read than was known is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .arguments import ABSENT, CONSTANTS, NOTHING_LEARNED, Group, Learned, Parameters, Step, leaves_of, read, rebuilt

# The dictionaries in which a module keeps what is read as its attributes.
_HOLDERS = ("_parameters", "_buffers", "_modules")


class StepAside(Exception):
    """The implementation has a graph, but compiled code would not behave as the implementation does."""


class Relearn(BaseException):
    """The arguments are to be read again, otherwise. No Exception, lest an implementation deals with it.

    Attributes:
        more: what is to be learned in addition.
        why: for people, if something has become dynamic.
    """

    def __init__(self, more: Learned, why: str | None = None) -> None:
        super().__init__(more)
        self.more, self.why = more, why


class StandIns:
    """The stand-ins of one capture.

    Attributes:
        unread: what was read of the objects without being known to be read.
        shown: all that the objects were seen to hold.
    """

    def __init__(self, parameters: Parameters, fake: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.unread: set[tuple[str, Step]] = set()
        self.shown: list[Any] = []
        self._parameters = parameters
        self._fake = fake

    def make(self, group: Group, items: Mapping[Step, Any]) -> Any:
        """An object that behaves as the one that the group is, with these values of what is known to be read."""
        real, name = group.owner, group.name
        known = dict(items)
        self.shown.extend(known.values())

        def value_of(step: Step) -> Any:
            if step not in known:
                self.unread.add((name, step))
                known[step] = self._stand_in_for(f"{name}.{step.name}", step.read(real))
            if known[step] is ABSENT:
                raise AttributeError(f"{type(real).__name__!r} object has no attribute {step.name!r}")
            return known[step]

        return _stand_in(real, name, value_of)

    def _stand_in_for(self, name: str, value: Any) -> Any:
        """What a value is in a capture: with fake tensors for those in it."""
        node = read(self._parameters, NOTHING_LEARNED, name, value)
        values = {leaf.source: leaf.value for leaf in leaves_of(node)}
        for leaf in leaves_of(node):
            if leaf.is_tensor:
                values[leaf.source] = self._fake(leaf.value)
            elif leaf.value is not ABSENT and not isinstance(leaf.value, CONSTANTS):
                raise StepAside(f"{leaf.name} is a {type(leaf.value).__name__}")
        return rebuilt(node, values, self.make)


def _stand_in(real: Any, name: str, value_of: Callable[[Step], Any]) -> Any:
    kind = type(real)

    def getattribute(self: Any, attribute: str) -> Any:
        if attribute == "__class__":
            return kind
        if attribute == "__dict__":
            raise StepAside(f"the implementation looks through the attributes of {name}")
        on_class = next((vars(base)[attribute] for base in kind.__mro__ if attribute in vars(base)), ABSENT)
        if hasattr(type(on_class), "__set__") or (on_class is not ABSENT and hasattr(type(on_class), "__get__")):
            overridden = attribute in vars(real) and not hasattr(type(on_class), "__set__")
            return value_of(Step(attribute)) if overridden else object.__getattribute__(self, attribute)
        if attribute in vars(real) or on_class is not ABSENT:
            return value_of(Step(attribute))
        if isinstance(real, torch.nn.Module):
            for holder in _HOLDERS:
                if attribute in vars(real).get(holder, ()):
                    return value_of(Step(attribute, holder))
        elif hasattr(kind, "__getattr__"):
            return kind.__getattr__(self, attribute)
        return value_of(Step(attribute))

    def setattribute(self: Any, attribute: str, value: Any = None) -> None:
        raise StepAside(f"the implementation sets or deletes {name}.{attribute}")

    def no_attribute(self: Any, attribute: str) -> Any:
        raise AttributeError(f"{kind.__name__!r} object has no attribute {attribute!r}")

    own = {"__getattribute__": getattribute, "__getattr__": no_attribute, "__module__": kind.__module__}
    stand_in = type(kind.__name__, (kind,), {**own, "__setattr__": setattribute, "__delattr__": setattribute})
    return object.__new__(stand_in)


def contents(value: Any) -> Any:
    """What lists and dictionaries hold, for a comparison: an implementation that changes one would change its copy."""
    if isinstance(value, dict):
        return {key: contents(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [contents(item) for item in value]
    return id(value)
