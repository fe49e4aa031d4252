"""What a mode does with a call, as a value. The route carries it out; ``explain`` prints it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .._cache.making import Maker
from .._cache.table import Table
from .._compile.config import RAISE, not_in_providers
from .._compile.outcome import FROZEN, IN_CUDA_GRAPH, Aside, Eager, Failed
from .._compile.specialization import NoCode, Specialization
from .._ir.protocol import Impl
from .._specialize.arguments import Arguments, Learned, flatten
from .._specialize.aside import why_aside, why_function_aside
from .._specialize.change import newly_dynamic, why_dynamic
from .._specialize.key import key_of


@dataclass(frozen=True)
class Run:
    """Compiled code runs."""

    specialization: Specialization


@dataclass(frozen=True)
class Load:
    """Saved code is loaded, and runs."""

    specialization: Specialization


@dataclass(frozen=True)
class Make:
    """Code is made first, or asked for in the background."""


Outcome = Run | Load | Make | Aside | Eager | Failed


@dataclass(frozen=True)
class Read:
    """A call's arguments as they are read for its key.

    Attributes:
        newly_dynamic: what has changed since earlier calls, and is read as dynamic from now on.
        why_new: the same, for people.
    """

    arguments: Arguments
    key: Hashable
    newly_dynamic: frozenset[str]
    why_new: str | None


@dataclass(frozen=True)
class Decision:
    """What becomes of a call.

    Attributes:
        read: None where its arguments do not matter.
        known: what is kept of calls with its key, if there is no code for them.
    """

    outcome: Outcome
    read: Read | None = None
    known: NoCode | None = None


def decide(
    maker: Maker, impl: Impl, table: Table, args: tuple[Any, ...], kwargs: Mapping[str, Any], more: Learned
) -> Decision:
    """Decide about a call for which dispatch has chosen ``impl``. Nothing is changed.

    Args:
        table: what is known of the implementation.
        more: how the arguments are to be read, beside what the table knows of that.
    """
    if impl.provider not in maker.config.providers:
        return Decision(Aside(not_in_providers(impl.provider, maker.config)))
    learned, changed, why_new = table.learned | more, frozenset[str](), None
    while True:
        arguments = flatten(maker.callee.parameters, args, kwargs, learned)
        reason = (why_function_aside(arguments) if maker.callee.is_function else None) or why_aside(arguments)
        if reason is not None:
            return Decision(Aside(reason))
        key = key_of(arguments)
        known = table.find(key, arguments)
        read = Read(arguments, key, changed, why_new)
        if isinstance(known, NoCode):
            return Decision(known.outcome, read, known)
        if known is not None:
            reason = known.why_aside(arguments)
            return Decision(Run(known) if reason is None else Aside(reason), read)
        if maker.makes_nothing:
            return Decision(Eager(FROZEN, raises=maker.config.on_new == RAISE), read)
        names = _newly_dynamic(maker, table, arguments)
        if names <= learned.dynamic:
            return Decision(_without_code(maker, impl, table, read), read)
        learned, changed, why_new = learned | Learned(dynamic=names), changed | names, why_dynamic(arguments, names)


def _newly_dynamic(maker: Maker, table: Table, arguments: Arguments) -> frozenset[str]:
    """What has changed since earlier calls, and is to be read as dynamic."""
    automatic = maker.callee.parameters.automatic
    return newly_dynamic(arguments, table.patterns(), sizes=automatic, floats=not maker.config.bitwise)


def _without_code(maker: Maker, impl: Impl, table: Table, read: Read) -> Outcome:
    if captures_cuda_graph(read.arguments):
        return Eager(IN_CUDA_GRAPH)
    if not maker.is_full(table):
        saved = maker.saved(impl, read.key, read.arguments)
        if saved is not None:
            return Load(saved)
    return maker.why_not_now(table) or Make()


def captures_cuda_graph(arguments: Arguments) -> bool:
    """Whether the call is being recorded, so that nothing may be compiled or allocated beside it."""
    on_cuda = any(leaf.value.is_cuda for leaf in arguments.tensors)
    return on_cuda and torch.cuda.is_current_stream_capturing()
