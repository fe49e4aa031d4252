"""Why a call needed a specialization of its own: in what it differs from the nearest that there was."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate, zip_longest
from operator import mul

from .arguments import Arguments, Node
from .key import KEYS, SHAPE, STRIDE, Fact, facts_of, state_facts

Components = Mapping[str, Fact]  # by name
NOT_GIVEN = Fact("", "not given")


def difference(new: Components, others: Iterable[tuple[Components, str]]) -> str | None:
    """In what a specialization differs from the nearest of the others, the latest of several: ``x is bf16, was f32``;
    None if there are none.

    Args:
        new: what its key is made of.
        others: what the others' keys are made of, and what does not hold of the call there, for people.
    """
    differences = [(_differences(new, old), why) for old, why in others]
    if not differences:
        return None
    nearest, why = min(reversed(differences), key=lambda each: _distance(each[0]))
    return "; ".join(f"{name} is {now.text}, was {before.text}" for name, (now, before) in _told(nearest)) or why


Differences = Mapping[str, tuple[Fact, Fact]]  # each with the fact now and before


def _differences(new: Components, old: Components) -> Differences:
    pairs = {name: (new.get(name, NOT_GIVEN), old.get(name, NOT_GIVEN)) for name in {**new, **old}}
    return {name: (now, before) for name, (now, before) in pairs.items() if now.value != before.value}


def _told(differences: Differences) -> list[tuple[str, tuple[Fact, Fact]]]:
    """Without what follows from another difference."""
    return [(name, pair) for name, pair in differences.items() if not _follows(name, differences)]


def _follows(name: str, differences: Differences) -> bool:
    """Whether a difference follows from another: a tensor that is not given has no shape, items make the length of a
    list, and where both are contiguous, a shape brings a stride."""
    node, _, aspect = name.partition("'s ")
    if NOT_GIVEN in differences[name]:
        return bool(aspect)
    if aspect == KEYS:
        items = (pair for other, pair in differences.items() if other.startswith((f"{node}[", f"{node}.")))
        return any(NOT_GIVEN in pair for pair in items)
    shapes = differences.get(f"{node}'s {SHAPE}")
    return aspect == STRIDE and shapes is not None and all(map(_contiguous, shapes, differences[name]))


def _contiguous(shape: Fact, stride: Fact) -> bool:
    """Whether these are shape and stride of a contiguous tensor, in which only the first size may be dynamic."""
    steps = [*accumulate((max(size, 1) for size in shape.value[:0:-1]), mul, initial=1)][: len(shape.value)]
    return bool(stride.value == tuple(reversed(steps)))


def _distance(differences: Differences) -> tuple[int, ...]:
    """How far one is from the other: first by what there is to tell, then by all that differs, such as strides that
    follow from a shape, where a shape counts for more than a stride, and last by how many sizes and strides differ."""
    told = _told(differences)
    not_given = sum(NOT_GIVEN in pair for _, pair in told)
    shapes, strides = ([pair for name, pair in told if name.endswith(f"'s {of}")] for of in (SHAPE, STRIDE))
    layouts = [pair for now, before in shapes + strides for pair in zip_longest(now.value, before.value)]
    return len(told), not_given, len(differences), len(shapes), sum(now != before for now, before in layouts)


def components_of(arguments: Arguments) -> dict[str, Fact]:
    """What the key of a call is made of."""
    return {**_by_name(arguments.nodes), **{fact.aspect: fact for fact in state_facts()}}


def argument_components(arguments: Arguments) -> dict[str, str]:
    """What the key has of the tensors and constants, for people."""
    return {name: fact.text for name, fact in _by_name(arguments.leaves).items()}


def state_components() -> dict[str, str]:
    """What the key has of the thread's state and torch's global state, for people."""
    return {fact.aspect: fact.text for fact in state_facts()}


def _by_name(nodes: Iterable[Node]) -> dict[str, Fact]:
    named = ((node.name, fact) for node in nodes for fact in facts_of(node))
    return {f"{name}'s {fact.aspect}" if fact.aspect else name: fact for name, fact in named}


def in_names(guard: str | None, arguments: Arguments) -> str | None:
    """A guard on the dynamic sizes in terms of the parameters' names, as ``2 <= x.size(0)``."""
    if guard is None:
        return None
    names = {leaf.source: leaf.name for leaf in arguments.leaves}
    return re.sub(r"\ba\d+(?:_\d+)*", lambda match: names.get(match[0], match[0]), guard)
