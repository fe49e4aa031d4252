"""What the nodes of a captured graph stand for: ``torch.fx`` leaves the type of a target and of a value open."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from .._torch.dispatch import OpOverload


def op_or_none(node: Node) -> OpOverload | None:
    """The op that a node calls; None for an input, the output, or a function that is no op, as ``operator.getitem``."""
    return node.target if isinstance(node.target, OpOverload) else None


def op_of(node: Node) -> OpOverload:
    """The op that a node calls, where it is known to call one."""
    assert isinstance(node.target, OpOverload), f"{node} calls {node.target}, which is no op"
    return node.target


def tensor_or_none(node: Node) -> Tensor | None:
    """The fake tensor that a node gives; None if it gives something else."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def tensor_of(node: Node) -> Tensor:
    """The fake tensor that a node gives, where it is known to give one."""
    value = node.meta["val"]
    assert isinstance(value, Tensor), f"{node} gives {value!r}, which is no tensor"
    return value
