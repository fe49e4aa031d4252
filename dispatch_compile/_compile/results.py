"""What an implementation returns, taken apart into tensors and an expression that puts it together again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .._specialize.stand_ins import StepAside


@dataclass
class Result:
    """A result.

    Attributes:
        outputs: the tensors in it that are no arguments.
        expression: makes the result, in terms of ``out``, the list of the outputs, and of the leaves' sources.
        names: what else the expression refers to: the classes of named tuples and dataclasses.
    """

    outputs: list[torch.Tensor] = field(default_factory=list)
    expression: str = ""
    names: dict[str, Any] = field(default_factory=dict)


def result_of(returned: Any, inputs: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> Result:
    """Take a result apart.

    Args:
        returned: what the implementation returned.
        inputs: its tensor arguments by source. One that is returned is given back itself.
        numbers: the symbols of dynamic sizes and numbers, by the expression that reads each.

    Raises:
        StepAside: there is something in it that code cannot make.
    """
    result = Result()
    result.expression = _Expression(result, inputs, numbers).of(returned)
    return result


@dataclass
class _Expression:
    result: Result
    inputs: Mapping[str, torch.Tensor]
    numbers: Mapping[str, Any]

    def of(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        if type(value) is float:
            return repr(value) if math.isfinite(value) else f"float({str(value)!r})"
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            for read, number in self.numbers.items():
                if number is value or number.node.expr == value.node.expr:
                    return read
            raise StepAside("the implementation returns a number that depends on a size or on a number")
        kind = type(value)
        if kind is torch.Size:
            self.result.names["Size"] = torch.Size
            return f"Size(({''.join(f'{self.of(item)}, ' for item in value)}))"
        if kind.__module__ == "torch.return_types":
            return f"{self._named(kind)}(({''.join(f'{self.of(item)}, ' for item in value)}))"
        if kind in (list, tuple):
            items = ", ".join(map(self.of, value))
            return f"[{items}]" if kind is list else f"({items}{',' if len(value) == 1 else ''})"
        if kind is dict and all(type(key) in (str, int) for key in value):
            return f"{{{', '.join(f'{key!r}: {self.of(item)}' for key, item in value.items())}}}"
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return f"{self._named(kind)}._make(({''.join(f'{self.of(item)}, ' for item in value)}))"
        if dataclasses.is_dataclass(kind):
            self.result.names["dataclass_with"] = dataclass_with
            fields = [f.name for f in dataclasses.fields(kind)]
            items = ", ".join(f"{name!r}: {self.of(getattr(value, name))}" for name in fields)
            return f"dataclass_with({self._named(kind)}, {{{items}}})"
        raise StepAside(f"the implementation returns a {kind.__name__}")

    def _tensor(self, tensor: torch.Tensor) -> str:
        for source, given in self.inputs.items():
            if given is tensor:
                return source
        outputs = self.result.outputs
        index = next((i for i, output in enumerate(outputs) if output is tensor), len(outputs))
        if index == len(outputs):
            outputs.append(tensor)
        return f"out[{index}]"

    def _named(self, kind: type) -> str:
        name = f"kind_{kind.__name__}_{len(self.result.names)}"
        self.result.names[name] = kind
        return name


def dataclass_with(kind: type, fields: Mapping[str, Any]) -> Any:
    """An instance with these fields, made without running its constructor again."""
    instance: Any = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(instance, name, value)
    return instance
