"""What ``forward_native`` returns, and what of it an op can return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._configuration import NotAnOp


@dataclass(frozen=True)
class Results:
    """What a call of ``forward_native`` returns. An op may return new tensors only, but static ``QuantFP8`` returns the
    scale that it was given beside the quantized tensor; such results are put in after the op's call.

    Attributes:
        container: tuple or list; None for a single tensor.
        given: for each result, the parameter whose argument it is; None for a new tensor.
    """

    container: type | None
    given: tuple[str | None, ...]

    @property
    def schema(self) -> str:
        """What the op returns."""
        new = self.given.count(None)
        return "Tensor" if new == 1 else f"({', '.join(['Tensor'] * new)})"

    @property
    def all_new(self) -> bool:
        """Whether the op returns what ``forward_native`` returns."""
        return self.container is None or (self.container is tuple and len(self.given) > 1 and not any(self.given))

    @staticmethod
    def of(result: Any, arguments: Mapping[str, Any]) -> Results:
        """Raises NotAnOp if they are not all tensors, or none of them is new."""
        container = None if isinstance(result, torch.Tensor) else type(result)
        items = (result,) if container is None else result
        if container not in (None, tuple, list) or not all(isinstance(item, torch.Tensor) for item in items):
            raise NotAnOp("forward_native returns something other than tensors")
        given = tuple(next((name for name, value in arguments.items() if value is item), None) for item in items)
        if None not in given:
            raise NotAnOp("forward_native returns no new tensor")
        return Results(container, given)

    def new(self, result: Any, arguments: Mapping[str, Any]) -> Any:
        """The new tensors among the results, as an op returns them: one, or a tuple.

        Raises:
            NotAnOp: this call's results are of another kind.
        """
        if Results.of(result, arguments) != self:
            raise NotAnOp("forward_native returns an argument in some calls and not in others")
        if self.container is None:
            return result
        new = tuple(item for item, name in zip(result, self.given, strict=True) if name is None)
        return new if len(new) > 1 else new[0]

    def completion(self, parameters: Sequence[str]) -> Callable[..., Any]:
        """``complete(new, *args, **kwargs)``: a call's results, of its arguments and what :meth:`new` left of them.

        It is generated, since it runs in every call.

        Args:
            parameters: of ``forward_native``.
        """
        new = "_" * (1 + max(map(len, parameters)))  # a name that none of them has
        several = self.given.count(None) > 1
        rest = iter(f"{new}[{i}]" if several else new for i in range(len(self.given)))
        items = "".join(f"{next(rest) if name is None else name}, " for name in self.given)
        results = f"[{items}]" if self.container is list else f"({items})"
        source = f"lambda {new}, {', '.join(f'{name}=None' for name in parameters)}: {results}"
        complete: Callable[..., Any] = eval(source)
        return complete
