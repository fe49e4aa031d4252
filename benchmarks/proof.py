"""Did a peer do what it claims: the right result, and by compiled code? A ``torch.compile``d function that silently
runs eagerly gives right results, and so would any mode that catches nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# torch.profiler's newer one attaches to the GPU's driver, which makes later launches dearer.
from torch.autograd.profiler_legacy import profile

from .cases import tensors
from .peers import Peer

# ATen ops that compute nothing on a tensor's elements, as wrappers of compiled code call them.
BOOKKEEPING = frozenset(
    "aten::" + name
    for name in """
    _local_scalar_dense _reshape_alias _unsafe_view alias as_strided detach detach_ empty empty_like empty_strided item
    lift_fresh reshape resolve_conj resolve_neg select slice split to unsqueeze view
    """.split()
)

# One step of the format, and in front of a quantization a difference may carry a value over to the next one.
RTOL = {torch.float8_e4m3fn: 0.126, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}
ATOL = {torch.float8_e4m3fn: 2e-3, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}


class Broken(Exception):
    """A peer that does not do what it claims, so that its times would mean nothing."""


def check_compiled(peer: Peer) -> None:
    """Run a peer once and see that no op but its own went through torch's dispatcher.

    Raises:
        Broken: some did.
    """
    with peer.context, profile() as profiled:
        peer.call(*peer.arguments(1)[0])
    ran = {event.name for event in profiled.function_events if event.name.startswith("aten::")}
    computing = sorted(ran - BOOKKEEPING)
    if computing:
        raise Broken(f"it ran eagerly: {', '.join(computing)}")


def check_result(result: Any, expected: Any, between: torch.dtype | None = None) -> None:
    """Compare with the eager result.

    Args:
        result, expected: what was given, and what eager gives.
        between: the dtype that values are rounded to on the way to the result; None if nothing is rounded.

    Raises:
        Broken: they differ by more than rounding.
    """
    for i, (one, other) in enumerate(zip(tensors(result), tensors(expected), strict=True)):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            raise Broken(f"result {i} is {one.dtype} {tuple(one.shape)}, not {other.dtype} {tuple(other.shape)}")
        difference = _difference(one, other, between or other.dtype)
        if difference is not None:
            raise Broken(f"result {i} differs from eager: {difference}")


def _difference(one: Tensor, other: Tensor, between: torch.dtype) -> str | None:
    rtol, atol = (max(allowed[other.dtype], allowed[between]) for allowed in (RTOL, ATOL))
    try:
        torch.testing.assert_close(one.to(torch.float32), other.to(torch.float32), rtol=rtol, atol=atol)
    except AssertionError as error:
        return " ".join(str(error).split())
    return None
