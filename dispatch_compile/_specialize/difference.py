"""Why a call needed a specialization of its own: in what it differs from the nearest that there was."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, zip_longest
from operator import mul

import torch

from .._torch.capture import dtype_abbreviation
from .._torch.dispatch import global_state
from .arguments import Arguments, Leaf, sizes, strides

Components = Mapping[str, str]  # text by name, so that "name is text" reads well
NOT_GIVEN = "not given"
_LAYOUT = ("'s shape", "'s stride")


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
    told = [f"{name} is {now}, was {before}" for name, (now, before) in nearest.items()]
    return "; ".join(told) or why


# What differs, each with the text now and before.
Differences = Mapping[str, tuple[str, str]]


def _distance(differences: Differences) -> tuple[int, int, int]:
    """How far one is from the other: first by what there is to tell, last by how many sizes and strides differ."""
    dimensions = sum(_dimensions_differing(*pair) for name, pair in differences.items() if name.endswith(_LAYOUT))
    return len(differences), sum(NOT_GIVEN in pair for pair in differences.values()), dimensions


def _dimensions_differing(now: str, before: str) -> int:
    return sum(one != other for one, other in zip_longest(_items(now), _items(before)))


def _differences(new: Components, old: Components) -> Differences:
    texts = {name: (new.get(name, NOT_GIVEN), old.get(name, NOT_GIVEN)) for name in {**new, **old}}
    return {name: pair for name, pair in texts.items() if pair[0] != pair[1] and not _follows(name, texts)}


def _follows(name: str, texts: Differences) -> bool:
    """Whether a difference follows from another: a tensor that is not given has no shape, and where both are
    contiguous, a shape brings a stride."""
    if NOT_GIVEN in texts[name]:
        return "'s " in name
    shapes = texts.get(name.replace("'s stride", "'s shape"))
    return name.endswith("'s stride") and shapes is not None and texts[name] == tuple(map(_contiguous, shapes))


def _contiguous(shape: str) -> str:
    """The strides of a contiguous tensor of a shape; both as text, where only the first size may be dynamic."""
    sizes = _items(shape)
    steps = accumulate((max(int(size), 1) for size in sizes[:0:-1]), mul, initial=1)
    return f"[{', '.join(map(str, [*steps][::-1]))}]" if sizes else "[]"


def _items(text: str) -> list[str]:
    return re.findall(r"[^][, ]+", text)


def components_of(arguments: Arguments) -> dict[str, str]:
    """What the key of a call is made of."""
    return {**argument_components(arguments), **state_components()}


def argument_components(arguments: Arguments) -> dict[str, str]:
    """What the key has of the arguments."""
    return dict(component for leaf in arguments.leaves for component in _of_leaf(leaf))


def state_components() -> dict[str, str]:
    """What the key has of the thread's state and torch's global state."""
    inference_mode = _on_or_off(torch.is_inference_mode_enabled())
    return {"inference mode": inference_mode, **dict(_of_state(json.loads(global_state())))}


def in_names(guard: str | None, arguments: Arguments) -> str | None:
    """A guard on the dynamic sizes in terms of the parameters' names, as ``2 <= x.size(0)``."""
    if guard is None:
        return None
    names = {leaf.source: leaf.name for leaf in arguments.leaves}
    return re.sub(r"\ba\d+(?:_\d+)*", lambda match: names.get(match[0], match[0]), guard)


def _of_leaf(leaf: Leaf) -> Iterator[tuple[str, str]]:
    value, name = leaf.value, leaf.name
    if not isinstance(value, torch.Tensor):
        yield name, f"any {type(value).__name__}" if leaf.dynamic else repr(value)
        return
    yield name, dtype_abbreviation(value.dtype)
    shape = ("s0" if isinstance(size, str) else str(size) for size in sizes(leaf))
    stride = (_times_s0(step[1]) if isinstance(step, tuple) else str(step) for step in strides(leaf))
    yield f"{name}'s shape", f"[{', '.join(shape)}]"
    yield f"{name}'s stride", f"[{', '.join(stride)}]"
    yield f"{name}'s device", str(value.device)
    yield f"{name}'s requires_grad", str(value.requires_grad)
    yield f"{name}'s is_inference()", str(value.is_inference())


def _times_s0(factor: int) -> str:
    return "s0" if factor == 1 else f"{factor}*s0"


def _of_state(state: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for name, value in state.items():
        yield name.replace("_", " "), _on_or_off(value) if isinstance(value, bool) else str(value)


def _on_or_off(value: bool) -> str:
    return "on" if value else "off"
