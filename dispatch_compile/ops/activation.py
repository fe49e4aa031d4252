"""Gated activations, as in the feed-forward layers of LLaMA-like and Gemma-like models."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 - the name that everybody gives it
from torch import Tensor

from .._ir.embedded import register_op


@register_op
def silu_and_mul(x: Tensor) -> Tensor:
    """The gated activation of LLaMA-like feed-forward layers, SwiGLU.

    ``silu(x[..., :D]) * x[..., D:]`` with ``silu(a) = a * sigmoid(a)``.

    >>> dc.ops.silu_and_mul(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    tensor([[2.1932, 7.0464]])

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, equation 5.

    Args:
        x: ``[T, ..., 2 * D]``, floating point: gate and up projections side by side.

    Returns:
        ``[T, ..., D]`` in ``x``'s dtype.

    Raises:
        RuntimeError, ValueError: the last dimension of ``x`` cannot be split into two halves.
    """
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@register_op
def gelu_and_mul(x: Tensor, approximate: str = "none") -> Tensor:
    """The gated activation of Gemma-like feed-forward layers, GEGLU.

    ``gelu(x[..., :D]) * x[..., D:]`` with ``gelu(a) = a * Φ(a)``; Φ is the normal distribution function.

    >>> dc.ops.gelu_and_mul(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), approximate="tanh")
    tensor([[2.5236, 7.8184]])

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, equation 5.

    Args:
        x: ``[T, ..., 2 * D]``, floating point: gate and up projections side by side.
        approximate: ``"none"`` for the exact Φ, ``"tanh"`` for its approximation.

    Returns:
        ``[T, ..., D]`` in ``x``'s dtype.

    Raises:
        RuntimeError, ValueError: the last dimension of ``x`` cannot be split into two halves; another ``approximate``.
    """
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * up
