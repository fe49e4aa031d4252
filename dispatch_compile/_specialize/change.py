"""What of the arguments changes from call to call, and so becomes dynamic by itself."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from .._torch.dispatch import global_state
from .arguments import Arguments, Leaf, strides
from .key import leaf_key


@dataclass(frozen=True)
class Pattern:
    """What a specialization was made for, leaf by leaf.

    Attributes:
        state: the thread's state and torch's.
        exact: by leaf, what the key has of it.
        wide: by leaf, what is left of that if dimension 0, or the number, is dynamic.
    """

    state: Hashable
    exact: Mapping[str, Hashable]
    wide: Mapping[str, Hashable]


def pattern_of(arguments: Arguments) -> Pattern:
    """What a specialization for these arguments would be made for."""
    return Pattern(
        (global_state(), torch.is_inference_mode_enabled()),
        {leaf.name: leaf_key(leaf) for leaf in arguments.leaves},
        {leaf.name: _wide(leaf) for leaf in arguments.leaves},
    )


def _wide(leaf: Leaf) -> Hashable:
    value = leaf.value
    if not isinstance(value, torch.Tensor):
        return ("any", type(value)) if type(value) in (int, float) else leaf_key(leaf)
    if not value.dim():
        return leaf_key(leaf)
    steps = strides(replace(leaf, dynamic=True)) if value.size(0) >= 2 else value.stride()
    rest = (tuple(value.shape[1:]), steps[1:])
    return (value.dtype, value.device, rest, value.requires_grad, value.is_inference())


def newly_dynamic(arguments: Arguments, made: Iterable[Pattern], *, sizes: bool, floats: bool) -> frozenset[str]:
    """The leaves that are to be dynamic from now on, since these arguments differ from what specializations were made
    for in nothing but dimension 0 of tensors, and in numbers.

    Args:
        arguments: of a call that needs a new specialization.
        made: what specializations there are.
        sizes: whether sizes become dynamic by themselves. It takes one other size.
        floats: whether floating-point numbers do, as integers. It takes two other values: many a number has two.
    """
    new = pattern_of(arguments)
    alike = [old for old in made if (old.state, old.wide) == (new.state, new.wide)]
    found = set()
    for leaf in arguments.leaves:
        others = {old.exact[leaf.name] for old in alike} - {new.exact[leaf.name]}
        if leaf.is_tensor:
            if sizes and others and not leaf.dynamic and leaf.value.size(0) >= 2:
                found.add(leaf.name)
        elif len(others) >= 2 and not leaf.dynamic and (floats or type(leaf.value) is int):
            found.add(leaf.name)
    return frozenset(found)


def why_dynamic(arguments: Arguments, names: frozenset[str]) -> str:
    """Since when leaves are dynamic: ``x, gate dynamic since the second token count``."""
    several = {
        "the second token count": [leaf.name for leaf in arguments.tensors if leaf.name in names],
        "the third value": [leaf.name for leaf in arguments.leaves if leaf.name in names and not leaf.is_tensor],
    }
    return "; ".join(f"{', '.join(of)} dynamic since {since}" for since, of in several.items() if of)
