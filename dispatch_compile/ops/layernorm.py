"""Root-mean-square normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ir.embedded import register_op


@register_op
def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """Root-mean-square normalization, in front of the attention and feed-forward layers of most recent models.

    ``y = x / sqrt(mean(x², last dimension) + epsilon) * weight``, computed in float32.

    >>> dc.ops.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 1e-6)
    tensor([[0.8485, 2.2627]])

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.

    Args:
        x: ``[T, ..., H]``, floating point.
        weight: ``[H]``, floating point, or None for no scaling.
        epsilon: added to the mean square.

    Returns:
        ``[T, ..., H]`` in ``x``'s dtype.

    Raises:
        RuntimeError: ``weight`` does not have ``H`` elements.
    """
    y = _normalized(x.to(torch.float32), weight, epsilon)
    return y.to(x.dtype)


@register_op(allow_inplace=True)
def fused_add_rms_norm(x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """The residual addition and the normalization that follows it, in one op.

    ``r = x + x_residual`` in float32, and ``y = rms_norm(r, weight, epsilon)`` of the unrounded sum.

    >>> y, r = dc.ops.fused_add_rms_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]), None, 1e-6)
    >>> y, r
    (tensor([[0.8485, 1.1314]]), tensor([[3., 4.]]))

    The overload ``fused_add_rms_norm.maybe_inplace`` may overwrite ``x`` and ``x_residual``.

    Source: ``fused_add_rms_norm`` of vLLM (``vllm/ir/ops/layernorm.py``); the norm as in :func:`rms_norm`.

    Args:
        x: ``[T, ..., H]``, floating point.
        x_residual: ``[T, ..., H]``, floating point.
        weight: ``[H]``, floating point, or None for no scaling.
        epsilon: added to the mean square.

    Returns:
        ``y`` and ``r``, both ``[T, ..., H]`` in ``x``'s dtype.

    Raises:
        RuntimeError: the shapes of ``x`` and ``x_residual`` do not match; ``weight`` does not have ``H`` elements.
    """
    total = x.to(torch.float32) + x_residual.to(torch.float32)
    y = _normalized(total, weight, epsilon)
    return y.to(x.dtype), total.to(x.dtype)


def _normalized(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + epsilon)
    return y if weight is None else y.to(weight.dtype) * weight
