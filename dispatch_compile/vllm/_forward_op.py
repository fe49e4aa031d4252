"""``forward_native`` of a ``CustomOp``, for one configuration of the instance, as an op that modes catch.

Each configuration has a torch op of its own: ``vllm_custom_op::quant_fp8``, the next one ``quant_fp8_2``. (Overloads of
one name would say it better, but torch crashes once some of them are gone.) Instances keep their op alive, and with the
last of them the op and what was compiled of it are freed.
"""

from __future__ import annotations

import itertools
import re
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.library import Library

from .._basics.fork import freed_in_children
from .._ir import registry
from .._ir.embedded import weakly
from .._ir.protocol import NATIVE
from .._ir.references import NativeOp
from .._torch.dispatch import OpOverload
from ._configuration import configuration_of, identity_of
from ._native import Native, activations_of
from ._results import Results

NAMESPACE = "vllm_custom_op"


class ForwardOp(NativeOp):
    """The op of one configuration. Called as the instance's ``forward_native``, it returns what that returns.

    Attributes:
        name: as modes know it, ``ns::name``.
    """

    eager_provider = NATIVE  # its kernel is forward_native

    def __init__(self, name: str, native: Native, results: Results, activations: list[str]) -> None:
        self.name = f"{NAMESPACE}::{name}"
        self._complete = None if results.all_new else results.completion(native.parameters)
        self._library = Library(NAMESPACE, "FRAGMENT")
        self._library.define(f"{name}{native.schema} -> {results.schema}")
        self._library.impl(name, weakly(self._run_native), "CompositeExplicitAutograd")
        torch.library.register_fake(self.name, weakly(self._run_native), lib=self._library)
        torch_op: OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
        super().__init__(torch_op, _new_results_of(native, results), activations)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        new = self.torch_op(*args, **kwargs)
        return new if self._complete is None else self._complete(new, *args, **kwargs)

    def _run_native(self, *args: Any, **kwargs: Any) -> Any:
        return self.dispatch().impl_fn(*args, **kwargs)


def _new_results_of(native: Native, results: Results) -> Callable[..., Any]:
    def new_results(*args: Any, **kwargs: Any) -> Any:
        return results.new(native.call(*args, **kwargs), native.named(args, kwargs))

    return new_results


_ops: weakref.WeakValueDictionary[Hashable, ForwardOp] = weakref.WeakValueDictionary()
_names: set[str] = set()  # of all ops made, so that no name comes back
_lock = freed_in_children(threading.Lock())


def forward_ops() -> Iterable[ForwardOp]:
    """The ops of the instances that are alive."""
    return [op for reference in _ops.valuerefs() if (op := reference()) is not None]


registry.add_source(forward_ops)


def forward_op(
    instance: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ForwardOp:
    """The op for an instance as it is now, and for calls that return what this one does; made on first use.

    Args:
        instance: a ``CustomOp``.
        function: its ``forward_native``, not bound to it.
        args, kwargs: the arguments of a call.

    Raises:
        NotAnOp: there can be none.
    """
    configuration = configuration_of(instance)
    identity = identity_of(configuration)
    native = Native(instance, function, configuration)
    activations = activations_of(instance, native.parameters)
    results = native.results(args, kwargs)
    key = (type(instance), id(function), identity, results)
    with _lock:  # until the modes know of it
        op = _ops.get(key)
        if op is None:
            op = _ops[key] = ForwardOp(_new_name(instance), native, results, activations)
            registry.changed()
    return op


def _new_name(instance: nn.Module) -> str:
    kind = type(instance)
    base = re.sub(r"\W", "_", str(getattr(kind, "name", kind.__name__)).lower())
    names = itertools.chain([base], (f"{base}_{n}" for n in itertools.count(2)))
    name = next(name for name in names if name not in _names)
    _names.add(name)
    return name
