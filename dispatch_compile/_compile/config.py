"""What the user decides about compilation: one frozen, hashable value."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from .._basics.checks import checked_names
from .._ir.registry import known_ops
from .._torch.inductor import inductor_option_type, inductor_options, known_backends

ON_FAILURE = ("native", "raise")
NO_EVICTION, LRU = EVICTION = ("none", "lru")
COMPILE, BACKGROUND, NATIVE, RAISE = ON_NEW = ("compile", "background", "native", "raise")


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """How a mode compiles: pass one to :class:`DispatchCompileMode`, :func:`enable` or :func:`compile_natives`.

    A configuration is immutable and hashable, and is part of the key under which a cache keeps code. ``on_new``,
    ``max_specializations`` and ``eviction`` do not affect the code: configurations that differ only in these are equal,
    and share code.

    >>> tuned = dc.CompileConfig(options={"coordinate_descent_tuning": True})
    >>> mode = dc.DispatchCompileMode(config=tuned)
    >>> dc.CompileConfig(on_new="background") == dc.CompileConfig()
    True
    >>> dc.CompileConfig(options={"max_autotun": True})
    Traceback (most recent call last):
    ValueError: CompileConfig: Inductor has no option 'max_autotun'; did you mean ...

    Args:
        backend: ``"inductor"``, the name of another registered ``torch.compile`` backend, or a callable
            ``(graph_module, example_inputs) -> callable``.
        options: Inductor options (see ``torch._inductor.list_options()``), as for ``torch.compile(options=...)``.
            Only for ``backend="inductor"``.
        bitwise: True for results with the bits of the eager ones. Inductor then fuses only what IEEE 754 defines to
            the last bit, rounds where eager does, and calls ATen's kernels for the rest: sums, exp, tanh and their
            like. ``docs/numerics.md`` says what that costs, and which differences remain. ``options`` are applied on
            top. Only for ``backend="inductor"``.
        providers: implementations of these providers run compiled. A call steps aside if the op's priority chooses
            another provider.
        on_failure: what a call does if its implementation cannot be captured or compiled: ``"native"`` runs it
            eagerly, with one warning that gives the reason; ``"raise"`` raises a :class:`CompileError`. The failure
            is remembered, and compiling is not tried again. The exception are transient failures, such as a full disk
            (any ``OSError``) or a lack of memory. Those are retried with exponential backoff: first after 5 seconds,
            then after 10, 20 and so on.
        on_new: what a call does if it needs new code:

            - ``"compile"``: it waits until the code is compiled, or is loaded if it was saved;
            - ``"background"``: it runs eagerly while a separate thread compiles, for tensors of zeros. These occupy as
              much memory as the call's arguments until the code is compiled. If that fails, the next call that needs
              the code raises or warns. Call :meth:`NativeCache.wait` before you capture a CUDA graph: a compilation on
              any thread would break the capture;
            - ``"native"``: it runs eagerly, as in a frozen mode (:meth:`DispatchCompileMode.freeze`);
            - ``"raise"``: it raises a :class:`CompileError` that says what to warm up.

            :meth:`DispatchCompileMode.warmup` compiles in each of these.
        max_specializations: the limit of specializations of one implementation, under one configuration, in one
            cache. A call that would exceed it runs eagerly. The first such call warns, and says what keeps changing.
        eviction: what happens at the limit. ``"lru"`` drops the specialization that was used least recently
            (approximate LRU: uses are not recorded call by call). ``"none"`` keeps them all.

    Raises:
        ValueError: an unknown option, backend, ``on_failure``, ``on_new`` or ``eviction``; ``providers`` is empty, or
            has a name that looks misspelt; ``options`` or ``bitwise`` for another backend than Inductor;
            ``max_specializations`` below 1.
        TypeError: an argument of the wrong type.
    """

    backend: str | Callable[..., Any] = field(default="inductor", compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)
    bitwise: bool = field(default=False, compare=False)
    providers: Collection[str] = field(default=("native",), compare=False)
    on_failure: str = field(default="native", compare=False)
    on_new: str = field(default=COMPILE, compare=False)
    max_specializations: int = field(default=256, compare=False)
    eviction: str = field(default=NO_EVICTION, compare=False)
    _identity: tuple[Any, ...] = field(init=False, repr=False)  # what makes configurations equal

    def __post_init__(self) -> None:
        for name, choices in (("on_failure", ON_FAILURE), ("on_new", ON_NEW), ("eviction", EVICTION)):
            if getattr(self, name) not in choices:
                raise ValueError(f"CompileConfig: {name} must be one of {choices}, not {getattr(self, name)!r}")
        if not isinstance(self.bitwise, bool):
            raise TypeError(f"CompileConfig: bitwise must be True or False, not {self.bitwise!r}")
        limit = self.max_specializations
        if not isinstance(limit, int) or isinstance(limit, bool):
            raise TypeError(f"CompileConfig: max_specializations must be a number, not {limit!r}")
        if limit < 1:
            raise ValueError(f"CompileConfig: max_specializations must be 1 or more, not {limit}")
        _check_backend(self.backend)
        if self.bitwise and self.backend != "inductor":
            raise ValueError(f"CompileConfig: bitwise is for Inductor, but the backend is {self.backend!r}")
        options = MappingProxyType(_checked_options(self.options, self.backend))
        providers = _checked_providers(self.providers)
        identity = (self.backend, _frozen(options), self.bitwise, providers, self.on_failure)
        for name, value in (("options", options), ("providers", providers), ("_identity", identity)):
            object.__setattr__(self, name, value)  # the class is frozen


def not_in_providers(provider: str, config: CompileConfig) -> str:
    """Why a call of an implementation by this provider is not compiled."""
    return f"provider {provider!r} is not in providers {config.providers}"


def _checked_providers(providers: Iterable[str]) -> tuple[str, ...]:
    names = checked_names("CompileConfig", "providers", providers)
    if not names:
        raise ValueError("CompileConfig: providers must name one or more, or nothing would ever be compiled")
    known = {provider for op in known_ops() for provider in getattr(op, "impls", ())} | {"native"}
    for name in names:
        suggestion = "" if name in known else _suggestion(name, known)
        if suggestion:  # what is like none of them may be registered later
            raise ValueError(f"CompileConfig: no op has a provider {name!r}{suggestion}")
    return names


def _check_backend(backend: str | Callable[..., Any]) -> None:
    if callable(backend) or backend == "inductor":
        return
    if not isinstance(backend, str):
        raise TypeError(f"CompileConfig: backend must be a name or a callable, not {backend!r}")
    known = known_backends()
    if backend not in known:
        raise ValueError(f"CompileConfig: unknown backend {backend!r}{_suggestion(backend, known)}")


def _checked_options(options: Mapping[str, Any], backend: str | Callable[..., Any]) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise TypeError(f"CompileConfig: options must be a mapping, not {type(options).__name__}")
    if not options:
        return {}
    if backend != "inductor":
        raise ValueError(f"CompileConfig: options are Inductor's, but the backend is {backend!r}")
    known = inductor_options()
    checked = {}
    for given, value in options.items():
        if not isinstance(given, str):
            raise TypeError(f"CompileConfig: the names of options must be strings, not {given!r}")
        name = given.replace("-", "_")
        if name not in known:
            raise ValueError(f"CompileConfig: Inductor has no option {given!r}{_suggestion(name, known)}")
        declared = inductor_option_type(name)
        if not _fits(value, declared):
            text = declared.__name__ if isinstance(declared, type) else declared
            raise TypeError(f"CompileConfig: Inductor's option {given!r} must be {text}, not {value!r}")
        checked[name] = value
    return checked


def _fits(value: Any, declared: Any) -> bool:
    """Whether a value is of a declared type, as far as scalars and containers go; True for any other type."""
    origin = get_origin(declared)
    if origin in (Union, UnionType):
        return any(value is None if kind is NoneType else _fits(value, kind) for kind in get_args(declared))
    kind = origin or declared
    if kind is float:
        return type(value) in (float, int)
    if kind in (bool, int, str):
        return type(value) is kind
    if kind in (list, tuple):
        return isinstance(value, (list, tuple))
    return kind is not dict or isinstance(value, dict)


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _frozen(value: Any) -> Any:
    """``value`` as something hashable that keeps apart what Inductor tells apart (``True`` from ``1``)."""
    if isinstance(value, Mapping):
        return frozenset((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(_frozen(item) for item in value))
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset(_frozen(item) for item in value))
    return (type(value), value)
