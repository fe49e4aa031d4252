"""What Inductor is asked for beside what the user asks for: options that depend on the graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.fx import Node

from .._basics.nodes import op_or_none, tensor_or_none
from .._dispatch.opaque import TORCH_NAMESPACES
from .capture import Captured


def options_for(captured: Captured) -> dict[str, Any]:
    """The options for a captured graph; those that its treatment asks for, and the user's, come on top of them."""
    return {
        # Our guards compare every size and stride before the code runs, and need not be told again. What ops of other
        # libraries return inside, only the code can compare with what their fake kernels promised.
        "size_asserts": any(map(_is_of_other_library, captured.graph.graph.nodes)),
        **_rounding(captured),
        # Keep subnormal numbers on a GPU, as eager does; Triton's libraries would take them for zero.
        "eager_numerics.disable_ftz": any(fake.device.type == "cuda" for fake in captured.fakes),
        # It drops additions of zero, which make 0.0 of -0.0, and, from torch 2.15 on, whole graphs: x * 1 is then no
        # code at all.
        "joint_graph_constant_folding": False,
        # Whether padded matrices are faster is measured when code is made; their products have other strides.
        "shape_padding": False,
        **_bounds_checks(captured),
    }


def _is_of_other_library(node: Node) -> bool:
    op = op_or_none(node)
    return op is not None and op.namespace not in TORCH_NAMESPACES


def _rounding(captured: Captured) -> Mapping[str, Any]:
    """Round intermediate results where the native implementation does, wherever leaving it out could be seen.

    On a GPU it is free. On a CPU it costs up to half of the time, so there it is left out where it changes results by
    no more than the last place: if what is rounded is only multiplied, divided, or returned. A sum can cancel.
    """
    on_cpu = all(fake.device.type == "cpu" for fake in captured.fakes)
    return {"emulate_precision_casts": not on_cpu or any(map(_amplifies_rounding, captured.graph.graph.nodes))}


def _amplifies_rounding(node: Node) -> bool:
    """Whether the node rounds to 16 bits and something other than a product takes the result."""
    value = tensor_or_none(node)
    if value is None or value.dtype not in _SIXTEEN_BITS or _only_moves_values(node):
        return False
    return not all(user.op == "output" or _is_product(user) for user in node.users)


def _is_product(node: Node) -> bool:
    op = op_or_none(node)
    return op is not None and op.overloadpacket in _PRODUCTS


def _only_moves_values(node: Node) -> bool:
    if node.target is operator.getitem:
        return _only_moves_values(cast(Node, node.args[0]))
    op = op_or_none(node)
    if op is None:
        return node.op == "placeholder"
    return op.is_view or op.overloadpacket in _MOVES


_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_PRODUCTS = (torch.ops.aten.mul, torch.ops.aten.div)
_MOVES = (torch.ops.aten.cat, torch.ops.aten.clone)


def _bounds_checks(captured: Captured) -> Mapping[str, Any]:
    """On a CPU, an index out of range ends the process if it is found on an OpenMP thread; on the caller's it raises.

    Whatever has integers may use them as indices.
    """
    tensors = [value for node in captured.graph.graph.nodes if (value := tensor_or_none(node)) is not None]
    indexes = any(t.device.type == "cpu" and t.dtype in (torch.int32, torch.int64) for t in tensors)
    return {"cpp.threads": 1} if indexes else {}
