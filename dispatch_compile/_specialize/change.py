"""What of the arguments changes from call to call, and so becomes dynamic by itself."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace

from .arguments import Arguments, Leaf, sizes
from .key import SHAPE, STRIDE, facts_of, state_facts, values


@dataclass(frozen=True)
class Pattern:
    """What a specialization was made for, leaf by leaf.

    Attributes:
        state: the thread's state and torch's.
        kept: by leaf, what code for any size in dimension 0, or any number, has of it.
        rest: by leaf, the size in dimension 0, or the number.
    """

    state: Hashable
    kept: Mapping[str, Hashable]
    rest: Mapping[str, Hashable]


def pattern_of(arguments: Arguments) -> Pattern:
    """What a specialization for these arguments would be made for."""
    rest = {leaf.name: sizes(leaf)[:1] if leaf.is_tensor else values(facts_of(leaf)) for leaf in arguments.leaves}
    return Pattern(values(state_facts()), {leaf.name: _kept(leaf) for leaf in arguments.leaves}, rest)


def _kept(leaf: Leaf) -> Hashable:
    facts = facts_of(replace(leaf, dynamic=leaf.may_be_dynamic))
    return tuple(fact.value[1:] if fact.aspect in (SHAPE, STRIDE) else fact.value for fact in facts)


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
    alike = [old for old in made if (old.state, old.kept) == (new.state, new.kept)]
    found = set()
    for leaf in arguments.leaves:
        others = {old.rest[leaf.name] for old in alike} - {new.rest[leaf.name]}
        enough = sizes and others if leaf.is_tensor else (floats or type(leaf.value) is int) and len(others) >= 2
        if enough and leaf.may_be_dynamic and not leaf.dynamic:
            found.add(leaf.name)
    return frozenset(found)


def why_dynamic(arguments: Arguments, names: frozenset[str]) -> str:
    """Since when leaves are dynamic: ``x, gate dynamic since the second token count``."""
    several = {
        "the second token count": [leaf.name for leaf in arguments.tensors if leaf.name in names],
        "the third value": [leaf.name for leaf in arguments.leaves if leaf.name in names and not leaf.is_tensor],
    }
    return "; ".join(f"{', '.join(of)} dynamic since {since}" for since, of in several.items() if of)
