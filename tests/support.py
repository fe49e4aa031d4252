"""What several test modules need: a cheap configuration, a comparison that lets nothing through, and a look inside."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

import dispatch_compile as dc

# The same keys, guards and capture as with Inductor, without the seconds that Inductor takes.
EAGER = dc.CompileConfig(backend="eager", on_failure="raise")
EAGER_OR_NATIVE = dc.CompileConfig(backend="eager")

# Of torch's: Inductor goes by what the CPU says of its vector instructions, and compiles nothing to try them.
TAKES_VECTORS_FOR_GRANTED = "TORCHINDUCTOR_VEC_ISA_OK"


class GatedBackend:
    """A backend that compiles, or, while the gate is closed, tells that it has begun and waits.

    Attributes:
        begun: set when it waits for the gate.
        gate: closed at first.
        threads: on which it compiled, or began to.
    """

    def __init__(self) -> None:
        self.begun, self.gate = threading.Event(), threading.Event()
        self.threads: list[threading.Thread] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> torch.fx.GraphModule:
        self.threads.append(threading.current_thread())
        if not self.gate.is_set():
            self.begun.set()
            assert self.gate.wait(60)
        return graph


def outcome(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """The result of a call, or the error that it raised."""
    try:
        return fn(*args, **kwargs)
    except Exception as error:
        return error


def assert_same(actual: Any, expected: Any, **tolerance: float) -> None:
    """Equal in everything that a caller can see: values (exactly, if no tolerance is given), dtypes, devices,
    shapes, strides, requires_grad, structure; for errors, type and text."""
    tolerance = tolerance or {"rtol": 0.0, "atol": 0.0}
    assert type(actual) is type(expected), f"{actual!r} where {expected!r} was expected"
    if isinstance(expected, Exception):
        assert str(actual) == str(expected)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other, **tolerance)
    elif isinstance(expected, torch.Tensor):
        assert (actual.dtype, actual.device, actual.shape) == (expected.dtype, expected.device, expected.shape)
        assert actual.stride() == expected.stride()
        assert (actual.requires_grad, actual.is_inference()) == (expected.requires_grad, expected.is_inference())
        torch.testing.assert_close(_comparable(actual), _comparable(expected), equal_nan=True, **tolerance)
        if not expected.dtype.is_complex:
            assert torch.equal(_comparable(actual).signbit(), _comparable(expected).signbit())
    else:
        assert repr(actual) == repr(expected)


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return tensor.float() if tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point else tensor


def guarded_entries(mode: dc.DispatchCompileMode, op: dc.IrOp, provider: str = "native") -> Sequence[Any]:
    """The exact guards in the mode's cache for one implementation, the latest first."""
    return mode.cache.table(op, op.impls[provider], mode.config).guarded


def specializations(mode: dc.DispatchCompileMode, op: dc.IrOp, provider: str = "native") -> list[Any]:
    """What the mode's cache holds for one implementation, the latest first."""
    found: list[Any] = []
    for entry in guarded_entries(mode, op, provider):
        if not any(entry.known is known for known in found):
            found.append(entry.known)
    return found
