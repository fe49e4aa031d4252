"""Which ops are known: every source of IR ops that the package can find."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from .._torch.dispatch import OpOverload
from .protocol import Op, TorchOp, is_torch_op, overloads

Source = Callable[[], Iterable["Op"]]

_sources: list[Source] = []
_polled: list[Source] = []
_quick: list[Source] = []
_called_through_torch: list[Callable[[], AbstractContextManager[object]]] = []
_listeners: list[Callable[[], None]] = []


def add_source(
    source: Source,
    *,
    poll: Source | None = None,
    called_through_torch: Callable[[], AbstractContextManager[object]] | None = None,
) -> None:
    """Add a function that lists IR ops.

    It says when its list changes, with :func:`changed`. If it cannot, ``poll`` lists the same ops; it is called
    whenever a mode is entered, so it must be quick. Where its ops may be called past torch, ``called_through_torch``
    makes a context in which they are not.
    """
    _sources.append(source)
    _quick.append(poll or source)
    if poll is not None:
        _polled.append(poll)
    if called_through_torch is not None:
        _called_through_torch.append(called_through_torch)


@contextmanager
def called_through_torch() -> Iterator[None]:
    """Inside, every call of an IR op on this thread is a call of its torch op, which tracing sees."""
    with ExitStack() as entered:
        for context in _called_through_torch:
            entered.enter_context(context())
        yield


def on_change(listener: Callable[[], None]) -> None:
    """Call ``listener`` after an op was registered or removed through this package."""
    _listeners.append(listener)


_generations = itertools.count(1)
generation = 0  # another number after each change to ops, implementations or priorities that is told of


def dispatch_changed() -> None:
    """Say that an op may choose another implementation from now on."""
    global generation
    generation = next(_generations)


def changed() -> None:
    """Tell the listeners that an op was registered or removed."""
    dispatch_changed()
    for listener in _listeners:
        listener()


def known_ops() -> list[Op]:
    """Every IR op known now, from all sources."""
    return [op for source in _sources for op in source()]


def torch_ops() -> list[TorchOp]:
    """Those of them that are called through torch; quicker, for those that are polled are not looked at."""
    return [op for source in _quick for op in source() if is_torch_op(op)]


def op_meant_by(value: object) -> TorchOp | None:
    """The IR op that is called by ``value``: the op itself, one of its overloads, or their packet."""
    for op in torch_ops():
        if value is op or value is getattr(op, "maybe_inplace", op) or value is op.torch_op.overloadpacket:
            return op
        if isinstance(value, OpOverload) and any(value.name() == overload.name() for overload in overloads(op)):
            return op
    return None


def polled_ops() -> list[Op]:
    """The ops of the sources that do not say when they change."""
    return [op for source in _polled for op in source()]
