"""Numbers that keep changing, as inputs of a graph.

An implementation is traced with a symbol for such a number, so that it behaves as the Python number does. Inductor
takes tensors, not floating-point symbols. So the graph is traced again with a tensor of one element in the number's
place, and every op that takes it computes as ATen's kernel does with a Python number.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .._basics.nodes import op_or_none, tensor_of
from .._torch.capture import sym_sqrt
from .._torch.dispatch import OpOverload, overload_named
from .._torch.inductor import functional_op

aten, prims = torch.ops.aten, torch.ops.prims

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)

# The ops for 16-bit tensors to which ATen's kernels take a Python number unrounded. Others round it to 16 bits first.
_UNROUNDED_ON_CPU = {aten.mul, aten.div, aten.lerp}
_UNROUNDED_ELSEWHERE = {aten.mul, aten.div, aten.lerp, aten.add, aten.sub, aten.rsub}


def _where(condition: Tensor, one: Any, other: Any) -> Any:
    """``torch.where`` of a tensor and a number."""
    tensor, number = (one, other) if isinstance(one, Tensor) else (other, one)
    if not isinstance(tensor, Tensor):
        return NotImplemented
    dtype = torch.result_type(tensor, 1.0 if isinstance(number, (float, torch.SymFloat)) else 1)
    operands = [
        x if isinstance(x, Tensor) else torch.scalar_tensor(x, dtype=dtype, device=tensor.device) for x in (one, other)
    ]
    return aten.where.self(condition, *operands)


# In inference mode torch's own decompositions, in C++, ask for the value of a symbol.
WITH_SYMBOLS = {aten.where.ScalarOther: _where, aten.where.ScalarSelf: _where}

# What makes a tensor of a number, with the number as the last of the inputs.
_MAKES = {aten.scalar_tensor.default, aten.full.default}

_OF_NUMBERS: Mapping[object, Callable[..., Tensor]] = {
    **{op: op for op in (operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow)},
    torch.sym_float: lambda number: number,
    torch.sym_max: torch.maximum,
    torch.sym_min: torch.minimum,
    sym_sqrt: torch.sqrt,
}


class CannotTakeNumber(Exception):
    """An op takes a number in a way that has no counterpart for a tensor."""


class NumbersAsTensors(fx.Interpreter):
    """Runs a graph in which symbols stand for numbers, given tensors of one float64 element for them."""

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        numbers = {id(self.env[of]) for of in n.all_input_nodes if _is_number(of)}
        if n.op != "call_function" or not numbers:
            return super().run_node(n)
        if n.target in _MAKES:
            made = tensor_of(n)
            number = prims.convert_element_type(self.env[n.all_input_nodes[-1]], made.dtype)
            return number.expand(made.shape).clone(memory_format=torch.contiguous_format)
        op = op_or_none(n)
        if op is not None:
            functional = functional_op(op)
            if functional._schema.is_mutable:
                raise CannotTakeNumber(f"{op} takes a number that changes")
            call = _Call(functional, numbers, [*args, *kwargs.values()])
            return call(args, kwargs, n.meta["val"]) if functional is op else call.in_place(args, kwargs)
        if n.target not in _OF_NUMBERS:
            raise CannotTakeNumber(f"it computes with a number that changes by {n.target}")
        return _OF_NUMBERS[n.target](*map(_number, args))


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymFloat)


def _number(value: Any) -> Tensor:
    if isinstance(value, torch.SymInt):
        raise CannotTakeNumber("it computes with a size and a number that changes")
    return value if isinstance(value, Tensor) else torch.scalar_tensor(value, dtype=torch.float64)


class _Call:
    """A call of an op, computed as ATen would with Python numbers in the place of some tensors."""

    def __init__(self, op: OpOverload, numbers: set[int], values: list[Any]) -> None:
        self.op = op
        self.numbers = numbers
        tensors = [value for value in values if isinstance(value, Tensor) and id(value) not in numbers]
        if not tensors:
            raise CannotTakeNumber(f"{op} takes a number that changes")
        on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
        self.rounds = op.overloadpacket not in (_UNROUNDED_ON_CPU if on_cpu else _UNROUNDED_ELSEWHERE)
        floating = {tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point or tensor.dtype.is_complex}
        wide = [torch.float32 if dtype in _SIXTEEN_BITS and not self.rounds else dtype.to_real() for dtype in floating]
        self.dtype = max(wide, key=lambda dtype: dtype.itemsize, default=torch.get_default_dtype())

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], expected: object) -> Tensor:
        op = self._of_tensors(args)
        parameters = op._schema.arguments
        operands = [self._operand(value, p.type) for value, p in zip(args, parameters, strict=False)]
        named = {p.name: self._operand(kwargs[p.name], p.type) for p in parameters if p.name in kwargs}
        result: Tensor = op(*operands, **named)
        if not isinstance(expected, Tensor):
            raise CannotTakeNumber(f"{self.op} takes a number that changes")
        if result.dtype is not expected.dtype:
            result = prims.convert_element_type(result, expected.dtype)
        return result

    def in_place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The same for an op that changes its first argument."""
        changed: Tensor = args[0]
        return changed.copy_(self(args, kwargs, changed))

    def _of_tensors(self, args: tuple[Any, ...]) -> OpOverload:
        """The overload of the op that takes tensors where this one is given them."""
        packet = self.op.overloadpacket
        for name in (self.op._overloadname, *packet.overloads()):
            candidate = overload_named(packet, name)
            parameters = candidate._schema.arguments
            takes_all = all(
                "Tensor" in str(parameter.type)
                for value, parameter in zip(args, parameters, strict=False)
                if isinstance(value, Tensor)
            )
            is_functional = not candidate._schema.is_mutable and not any(parameter.is_out for parameter in parameters)
            if takes_all and is_functional and len(args) <= len(parameters):
                return candidate
        raise CannotTakeNumber(f"{self.op} takes a number that changes")

    def _operand(self, value: Any, parameter_type: object) -> Any:
        if isinstance(value, Tensor) and id(value) in self.numbers:
            return prims.convert_element_type(value, self.dtype)
        if isinstance(value, (int, float)) and "Tensor" in str(parameter_type):
            return torch.scalar_tensor(value, dtype=self.dtype)
        if isinstance(value, Tensor) and value.dtype in _SIXTEEN_BITS and not self.rounds:
            return prims.convert_element_type(value, self.dtype)
        return value
