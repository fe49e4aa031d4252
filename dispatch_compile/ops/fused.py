"""An op and the quantization of what it gives, as in front of a matrix product in 8 bits: each a composition of two
ops of this package, which compiled code fuses.

What the first op gives is rounded to its dtype in between, as where the two are called one after the other. They are
what vLLM has handwritten kernels for (``csrc/quantization/fused_kernels``).
"""

from __future__ import annotations

from torch import Tensor

from .._ir.embedded import register_op
from .activation import silu_and_mul
from .layernorm import fused_add_rms_norm, rms_norm
from .quantization import quant_fp8_per_group, quant_fp8_per_token


@register_op
def silu_and_mul_quant_fp8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """``q, s = quant_fp8_per_token(silu_and_mul(x))``.

    Args:
        x: ``[T, ..., 2 * D]``, floating point: gate and up projections side by side.

    Returns:
        ``q``: ``[T, ..., D]``, float8_e4m3fn; ``s``: ``[T, ..., 1]``, float32.
    """
    q, scale = quant_fp8_per_token(silu_and_mul(x))
    return q, scale


@register_op
def silu_and_mul_quant_fp8_per_group(x: Tensor) -> tuple[Tensor, Tensor]:
    """``q, s = quant_fp8_per_group(silu_and_mul(x))``.

    Args:
        x: ``[T, ..., 2 * D]``, floating point: gate and up projections side by side; ``D`` divisible by 128.

    Returns:
        ``q``: ``[T, ..., D]``, float8_e4m3fn; ``s``: ``[T, ..., D / 128]``, float32.

    Raises:
        ValueError: ``D`` is not divisible by 128.
    """
    q, scale = quant_fp8_per_group(silu_and_mul(x))
    return q, scale


@register_op
def rms_norm_quant_fp8_per_token(x: Tensor, weight: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """``q, s = quant_fp8_per_token(rms_norm(x, weight, epsilon))``.

    Args:
        x: ``[T, ..., H]``, floating point.
        weight: ``[H]``, or None for no scaling.
        epsilon: added to the mean square.

    Returns:
        ``q``: ``[T, ..., H]``, float8_e4m3fn; ``s``: ``[T, ..., 1]``, float32.
    """
    q, scale = quant_fp8_per_token(rms_norm(x, weight, epsilon))
    return q, scale


@register_op
def rms_norm_quant_fp8_per_group(x: Tensor, weight: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """``q, s = quant_fp8_per_group(rms_norm(x, weight, epsilon))``.

    Args:
        x: ``[T, ..., H]``, floating point, ``H`` divisible by 128.
        weight: ``[H]``, or None for no scaling.
        epsilon: added to the mean square.

    Returns:
        ``q``: ``[T, ..., H]``, float8_e4m3fn; ``s``: ``[T, ..., H / 128]``, float32.

    Raises:
        ValueError: ``H`` is not divisible by 128.
    """
    q, scale = quant_fp8_per_group(rms_norm(x, weight, epsilon))
    return q, scale


@register_op
def fused_add_rms_norm_quant_fp8_per_token(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``y, r = fused_add_rms_norm(x, x_residual, weight, epsilon)`` and ``q, s = quant_fp8_per_token(y)``.

    Args:
        x: ``[T, ..., H]``, floating point.
        x_residual: ``[T, ..., H]``.
        weight: ``[H]``, or None for no scaling.
        epsilon: added to the mean square.

    Returns:
        ``q``: ``[T, ..., H]``, float8_e4m3fn; ``s``: ``[T, ..., 1]``, float32; ``r``: ``[T, ..., H]`` in ``x``'s dtype.
    """
    y, residual = fused_add_rms_norm(x, x_residual, weight, epsilon)
    q, scale = quant_fp8_per_token(y)
    return q, scale, residual


@register_op
def fused_add_rms_norm_quant_fp8_per_group(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``y, r = fused_add_rms_norm(x, x_residual, weight, epsilon)`` and ``q, s = quant_fp8_per_group(y)``.

    Args:
        x: ``[T, ..., H]``, floating point, ``H`` divisible by 128.
        x_residual: ``[T, ..., H]``.
        weight: ``[H]``, or None for no scaling.
        epsilon: added to the mean square.

    Returns:
        ``q``: ``[T, ..., H]``, float8_e4m3fn; ``s``: ``[T, ..., H / 128]``, float32; ``r``: ``[T, ..., H]`` in ``x``'s
        dtype.

    Raises:
        ValueError: ``H`` is not divisible by 128.
    """
    y, residual = fused_add_rms_norm(x, x_residual, weight, epsilon)
    q, scale = quant_fp8_per_group(y)
    return q, scale, residual
