"""What identifies a specialization."""

from __future__ import annotations

import weakref
from collections.abc import Hashable

import torch

from .._torch.dispatch import global_state
from .arguments import Arguments, Group, Leaf, Node, sizes, strides


class Kind(weakref.ref[type]):
    """The class of an object. It is not kept alive, since the function that the key is of may be its method."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(self())


def key_of(arguments: Arguments) -> Hashable:
    """What identifies the specialization for these arguments; equal keys mean that one capture serves both,
    as long as its guards on the dynamic sizes hold. How the arguments are given, by position or not, is no part."""
    nodes = sorted((root.node for root in arguments.roots), key=lambda node: node.source)
    state = (global_state(), torch.is_inference_mode_enabled())
    return (*state, tuple((node.source, _node_key(node)) for node in nodes))


def _node_key(node: Node) -> Hashable:
    if isinstance(node, Leaf):
        return leaf_key(node)
    keys = tuple(map(str, node.keys)) if node.owner is not None else node.keys
    return (_kind(node), keys, tuple(map(_node_key, node.items)))


def _kind(group: Group) -> Hashable:
    if group.owner is not None:
        return Kind(group.kinds[0])
    return "several" if list in group.kinds else group.kinds


def leaf_key(leaf: Leaf) -> Hashable:
    """What a leaf adds to the key."""
    value = leaf.value
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.device, sizes(leaf), strides(leaf), value.requires_grad, value.is_inference())
    if leaf.dynamic:
        return (type(value), "any")
    if isinstance(value, (float, complex)):
        return (type(value), repr(value))  # tells 0.0 from -0.0, and NaN equals itself
    return (type(value), value)
