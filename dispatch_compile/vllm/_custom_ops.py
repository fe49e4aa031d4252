"""``CustomOp`` layers: in a mode, those that vLLM compiles by themselves run as ops that the mode catches.

vLLM gives some of its layers a ``torch.compile`` wrapper around ``forward_native`` (``CustomOp.maybe_compile``), for
calls from opaque ops' bodies. In its place goes a method that runs

- vLLM's wrapper, while torch.compile traces, or outside of modes, or if the mode does not catch the op;
- otherwise the op that ``_forward_op.py`` makes of ``forward_native``.

Layers that vLLM leaves alone stay so: enabled ones with kernels of their own, and those made with
``compile_native=False``, which vLLM's pattern matching traces.
"""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from operator import is_
from typing import Any

import torch
from torch import nn

from .._basics.fork import freed_in_children
from .._call.kernel import route_of
from .._compile.config import not_in_providers
from .._dispatch.active import active_modes
from .._ir.protocol import NATIVE
from ._configuration import NotAnOp
from ._forward_op import ForwardOp, forward_op
from ._required import required
from ._settings import compilation_off, log_once, say_once

_PURPOSE = "catch its CustomOp layers"
_METHOD = "_forward_method"  # the attribute that CustomOp.forward calls
MOST_CONFIGURATIONS = 8  # of one instance, as many as torch.compile recompiles for


class _Forward:
    """The forward method of one instance."""

    def __init__(self, instance: nn.Module, vllms_own: Callable[..., Any]) -> None:
        self._instance = weakref.ref(instance)
        self._vllms_own = vllms_own
        forward_native: Any = instance.forward_native  # nn.Module says of any attribute that it is a tensor or module
        self._function: Callable[..., Any] = getattr(forward_native, "__func__", forward_native)
        self._state: tuple[Any, ...] = ()  # the attributes' values that `_op` is for
        self._op: ForwardOp | None = None  # None: there can be none
        self._ops: set[ForwardOp] = set()  # kept: an attribute that changes may change back

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # is_compiling() would also be true while another thread compiles
            return self._vllms_own(*args, **kwargs)
        if not active_modes():
            return self._vllms_own(*args, **kwargs)
        try:
            op = self._current_op(args, kwargs)
            if op is not None and _is_compiled(op):
                return op(*args, **kwargs)
        except NotAnOp as reason:
            result = self._vllms_own(*args, **kwargs)  # an error of the implementation's own comes out here
            self._leave_to_vllm(reason)
            return result
        return self._vllms_own(*args, **kwargs)

    def _current_op(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ForwardOp | None:
        instance = self._instance()
        if instance is None:
            return None
        attributes = vars(instance)
        if len(attributes) != len(self._state) or not all(map(is_, attributes.values(), self._state)):
            if not all(map(_is_plain, (*args, *kwargs.values()))):
                return None
            if len(self._ops) == MOST_CONFIGURATIONS:
                raise NotAnOp(f"its attributes change, and it has been compiled for {MOST_CONFIGURATIONS} values")
            self._op = forward_op(instance, self._function, args, kwargs)
            self._ops.add(self._op)
            self._state = tuple(attributes.values())
        return self._op

    def _leave_to_vllm(self, reason: NotAnOp) -> None:
        instance = self._instance()
        if instance is not None:
            self._op, self._state = None, tuple(vars(instance).values())
            say_once(f"{type(instance).__qualname__} cannot be caught, and runs as vLLM made it: {reason}")

    def __deepcopy__(self, memo: object) -> _Forward:
        """A copy of the instance shares this, as it would share vLLM's method, which is a function."""
        return self

    def undo(self) -> None:
        """Give the instance vLLM's own method back."""
        instance = self._instance()
        if instance is not None and vars(instance).get(_METHOD) == self.run:
            setattr(instance, _METHOD, self._vllms_own)


def _is_plain(argument: Any) -> bool:
    """Whether the argument, if it is a tensor, is no tracer's: those do not show what forward_native returns."""
    kind = type(argument)
    return not isinstance(argument, torch.Tensor) or kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def _is_compiled(op: ForwardOp) -> bool:
    """Whether the mode that catches the op, if any does, compiles native implementations; if not, that is counted."""
    route = route_of(active_modes(), op.name)
    if route is None or NATIVE in route.config.providers:
        return route is not None
    route.counters.stepped_aside(not_in_providers(op.dispatch().provider, route.config))
    return False


_forwards: weakref.WeakSet[_Forward] = weakref.WeakSet()


def _adopted(instance: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    """What the instance is to run in place of the method that vLLM chose."""
    if getattr(method, "__wrapped__", None) != instance.forward_native:  # torch.compile's and vLLM's wrappers set it
        return method
    forward = _Forward(instance, method)
    _forwards.add(forward)
    return forward.run


_handles: set[CatchHandle] = set()
_catching = ExitStack()  # what the last handle's remove() undoes
_lock = freed_in_children(threading.Lock())


class CatchHandle:
    """What :func:`catch_custom_ops` returns; :meth:`remove` undoes it."""

    def remove(self) -> None:
        """Leave the layers to vLLM again, once every handle is removed. Harmless when repeated."""
        with _lock:
            _handles.discard(self)
            if not _handles:
                _catching.close()


def _catch() -> None:
    from vllm.model_executor.custom_op import CustomOp

    vllms_own = required(CustomOp, "dispatch_forward", _PURPOSE)

    @functools.wraps(vllms_own)
    def dispatch_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        reason = compilation_off()
        if reason is not None:
            log_once(f"{reason}; CustomOp layers stay as vLLM makes them")
        return _adopted(self, vllms_own(self, *args, **kwargs))

    CustomOp.dispatch_forward = dispatch_forward
    _catching.callback(_release, CustomOp, vllms_own)
    for instance in _objects():
        if issubclass(type(instance), CustomOp) and _METHOD in vars(instance):
            setattr(instance, _METHOD, _adopted(instance, vars(instance)[_METHOD]))


def _objects() -> list[Any]:
    """Everything that may be a layer, also what is frozen: vLLM calls ``gc.freeze`` once an engine has started, and
    ``gc.get_objects`` leaves out what that took from the garbage collector."""
    if not gc.get_freeze_count():
        return gc.get_objects()
    gc.collect()  # what is garbage is not to be frozen, and kept for ever
    gc.unfreeze()
    try:
        return gc.get_objects()
    finally:
        gc.freeze()


def _release(custom_op: Any, vllms_own: Callable[..., Any]) -> None:
    custom_op.dispatch_forward = vllms_own
    for forward in list(_forwards):
        forward.undo()


def catch_custom_ops() -> CatchHandle:
    """Let modes catch vLLM's ``CustomOp`` layers: those that exist now, and those that are made later.

    :func:`enable` does this for a process. Call it yourself where you enter a mode by hand:

    >>> handle = dc.vllm.catch_custom_ops()
    >>> with dc.DispatchCompileMode(trace=True) as mode:
    ...     pass  # run the model
    >>> handle.remove()

    Inside a mode, a layer that vLLM would compile on its own (``SiluAndMul``, ``QuantFP8``, ...) runs as an op of the
    namespace ``vllm_custom_op``. There is one op for each configuration of a class, and layers of equal configuration
    share it. If an attribute of the layer changes, that is another configuration. The activations are those in vLLM's
    own ``dynamic_arg_dims``, or else the parameters whose names start with ``x``. Outside of modes, and under
    ``torch.compile``, a layer runs as vLLM made it.

    Some layers cannot become an op, and stay as vLLM made them; a :class:`DispatchCompileWarning` says why. These are
    layers that hold tensors, or values that may change unnoticed, and layers whose ``forward_native`` has no type
    hints, has no activations, or returns something other than tensors.

    Returns:
        A handle whose ``remove()`` undoes it.

    Raises:
        ImportError: vLLM is not installed.
        RuntimeError: this version of vLLM lacks an attribute that is needed (the text names it).
    """
    handle = CatchHandle()
    with _lock:
        if not _handles:
            _catch()
        _handles.add(handle)
    return handle
