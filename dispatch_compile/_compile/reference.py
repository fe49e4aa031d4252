"""Whether a reference implementation gives what its op gives: it takes the op's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._ir.references import NativeImpl
from .._specialize.arguments import Arguments
from .._torch.capture import new_fake_mode
from .layouts import Layout

Results = Layout | str | list[Any]  # a tensor's layout, something else's type, several of them


def why_wrong(impl: NativeImpl, arguments: Arguments) -> str | None:
    """In what a reference implementation's results differ from the op's own, in all but the values; None if in nothing.

    The op's fake or meta kernel tells what the op gives. If there is none, or it tells something else, the op itself
    runs once with these arguments: what it gives is right.
    """
    overload = impl.torch_op
    try:
        given = _on_fakes(impl.impl_fn, arguments)
    except Exception:
        return None  # to capture it says why
    try:
        if _agree(given, _on_fakes(overload, arguments)):
            return None
    except Exception:  # whatever a kernel does that was not written for fakes
        pass
    if overload._schema.is_mutable:
        return None  # it must not run twice
    args, kwargs = arguments.rebuilt(arguments.values)
    own = _results(overload(*args, **kwargs))
    if _agree(given, own):
        return None
    return (
        f"the reference implementation of {overload.name()} gives {_text(given)} where the op itself gives "
        f"{_text(own)}; mend what was given to register_native"
    )


def _on_fakes(fn: Callable[..., Any], arguments: Arguments) -> Results:
    tensors = [leaf.value for leaf in arguments.tensors]
    with new_fake_mode(None):
        fakes = [torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device) for t in tensors]
        args, kwargs = arguments.rebuilt(arguments.values_with(fakes))
        return _results(fn(*args, **kwargs))


def _results(value: Any) -> Results:
    if isinstance(value, torch.Tensor):
        return Layout.of(value)
    if isinstance(value, (tuple, list)):
        return list(map(_results, value))
    return type(value).__name__


def _agree(one: Results, other: Results) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_agree, one, other))
    if isinstance(one, Layout) and isinstance(other, Layout):
        return one.addressing == other.addressing
    return one == other


def _text(results: Results) -> str:
    if isinstance(results, list):
        return f"{len(results)} results ({'; '.join(map(_text, results))})"
    return str(results)
