"""Gated activations, as in the feed-forward layers of LLaMA-like and Gemma-like models."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 - the name that everybody gives it
from torch import Tensor

from .._ir.embedded import register_op


@register_op
def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(x[..., :D]) * x[..., D:]`` with ``silu(a) = a * sigmoid(a)`` (SwiGLU).

    Shazeer, "GLU Variants Improve Transformer", 2020, equation 5.

    Args:
        x: ``[T, ..., 2 * D]``, floating point: gate and up projections side by side.

    Returns:
        ``[T, ..., D]`` in ``x``'s dtype.
    """
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@register_op
def gelu_and_mul(x: Tensor, approximate: str = "none") -> Tensor:
    """``gelu(x[..., :D]) * x[..., D:]`` with ``gelu(a) = a * Φ(a)`` (GEGLU).

    Shazeer, "GLU Variants Improve Transformer", 2020, equation 5.

    Args:
        x: ``[T, ..., 2 * D]``, floating point: gate and up projections side by side.
        approximate: ``"none"`` for the exact Φ, ``"tanh"`` for its approximation.

    Returns:
        ``[T, ..., D]`` in ``x``'s dtype.
    """
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * up
