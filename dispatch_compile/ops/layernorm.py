"""Root-mean-square normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ir.embedded import register_op


@register_op
def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """``y = x / sqrt(mean(x², last dimension) + epsilon) * weight``, computed in float32.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.

    Args:
        x: ``[T, ..., H]``, floating point.
        weight: ``[H]``, or None for no scaling.
        epsilon: added to the mean square.

    Returns:
        ``[T, ..., H]`` in ``x``'s dtype.
    """
    y = _normalized(x.to(torch.float32), weight, epsilon)
    return y.to(x.dtype)


@register_op(allow_inplace=True)
def fused_add_rms_norm(x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """The residual addition in front of a normalization, and the normalization: ``r = x + x_residual`` in float32,
    ``y = rms_norm(r)`` of the unrounded sum.

    Args:
        x: ``[T, ..., H]``, floating point.
        x_residual: ``[T, ..., H]``.
        weight: ``[H]``, or None for no scaling.
        epsilon: added to the mean square.

    Returns:
        ``y`` and ``r``, both ``[T, ..., H]`` in ``x``'s dtype.
    """
    total = x.to(torch.float32) + x_residual.to(torch.float32)
    y = _normalized(total, weight, epsilon)
    return y.to(x.dtype), total.to(x.dtype)


def _normalized(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + epsilon)
    return y if weight is None else y.to(weight.dtype) * weight
