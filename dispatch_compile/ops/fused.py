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
    """SwiGLU and the quantization of its result, in front of the down projection in 8 bits.

    ``q, s = quant_fp8_per_token(silu_and_mul(x))``. Inside a mode the two run as one piece of compiled code. The first
    result is rounded to its dtype in between, as if the two were called one after the other.

    >>> q, s = dc.ops.silu_and_mul_quant_fp8_per_token(torch.ones(8, 512))
    >>> q.shape, s.shape
    (torch.Size([8, 256]), torch.Size([8, 1]))

    Source: the two ops that it is composed of.

    Args:
        x: ``[T, ..., 2 * D]``, floating point: gate and up projections side by side.

    Returns:
        ``q``: ``[T, ..., D]``, float8_e4m3fn; ``s``: ``[T, ..., 1]``, float32.

    Raises:
        RuntimeError, ValueError: the last dimension of ``x`` cannot be split into two halves.
    """
    q, scale = quant_fp8_per_token(silu_and_mul(x))
    return q, scale


@register_op
def silu_and_mul_quant_fp8_per_group(x: Tensor) -> tuple[Tensor, Tensor]:
    """SwiGLU and the quantization of its result per group, as in DeepSeek-V3's experts.

    ``q, s = quant_fp8_per_group(silu_and_mul(x))``. Inside a mode the two run as one piece of compiled code. The first
    result is rounded to its dtype in between, as if the two were called one after the other.

    >>> q, s = dc.ops.silu_and_mul_quant_fp8_per_group(torch.ones(8, 512))
    >>> q.shape, s.shape
    (torch.Size([8, 256]), torch.Size([8, 2]))

    Source: the two ops that it is composed of.

    Args:
        x: ``[T, ..., 2 * D]``, floating point: gate and up projections side by side; ``D`` divisible by 128.

    Returns:
        ``q``: ``[T, ..., D]``, float8_e4m3fn; ``s``: ``[T, ..., D / 128]``, float32.

    Raises:
        ValueError: ``D`` is not divisible by 128.
        RuntimeError, ValueError: the last dimension of ``x`` cannot be split into two halves.
    """
    q, scale = quant_fp8_per_group(silu_and_mul(x))
    return q, scale


@register_op
def rms_norm_quant_fp8_per_token(x: Tensor, weight: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """A normalization and the quantization of its result, in front of a projection in 8 bits.

    ``q, s = quant_fp8_per_token(rms_norm(x, weight, epsilon))``. Inside a mode the two run as one piece of compiled
    code. The first result is rounded to its dtype in between, as if the two were called one after the other.

    >>> q, s = dc.ops.rms_norm_quant_fp8_per_token(torch.ones(8, 256), torch.ones(256), 1e-6)
    >>> q.shape, s.shape
    (torch.Size([8, 256]), torch.Size([8, 1]))

    Source: the two ops that it is composed of.

    Args:
        x: ``[T, ..., H]``, floating point.
        weight: ``[H]``, floating point, or None for no scaling.
        epsilon: added to the mean square.

    Returns:
        ``q``: ``[T, ..., H]``, float8_e4m3fn; ``s``: ``[T, ..., 1]``, float32.

    Raises:
        RuntimeError: ``weight`` does not have ``H`` elements.
    """
    q, scale = quant_fp8_per_token(rms_norm(x, weight, epsilon))
    return q, scale


@register_op
def rms_norm_quant_fp8_per_group(x: Tensor, weight: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """A normalization and the quantization of its result per group, in front of a projection in 8 bits.

    ``q, s = quant_fp8_per_group(rms_norm(x, weight, epsilon))``. Inside a mode the two run as one piece of compiled
    code. The first result is rounded to its dtype in between, as if the two were called one after the other.

    >>> q, s = dc.ops.rms_norm_quant_fp8_per_group(torch.ones(8, 256), torch.ones(256), 1e-6)
    >>> q.shape, s.shape
    (torch.Size([8, 256]), torch.Size([8, 2]))

    Source: the two ops that it is composed of.

    Args:
        x: ``[T, ..., H]``, floating point, ``H`` divisible by 128.
        weight: ``[H]``, floating point, or None for no scaling.
        epsilon: added to the mean square.

    Returns:
        ``q``: ``[T, ..., H]``, float8_e4m3fn; ``s``: ``[T, ..., H / 128]``, float32.

    Raises:
        ValueError: ``H`` is not divisible by 128.
        RuntimeError: ``weight`` does not have ``H`` elements.
    """
    q, scale = quant_fp8_per_group(rms_norm(x, weight, epsilon))
    return q, scale


@register_op
def fused_add_rms_norm_quant_fp8_per_token(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual addition, the normalization, and the quantization of its result, between two layers.

    ``y, r = fused_add_rms_norm(x, x_residual, weight, epsilon)`` and ``q, s = quant_fp8_per_token(y)``. Inside a mode
    the two run as one piece of compiled code. The first result is rounded to its dtype in between, as if the two were
    called one after the other.

    >>> x = torch.ones(8, 256)
    >>> q, s, r = dc.ops.fused_add_rms_norm_quant_fp8_per_token(x, x, None, 1e-6)
    >>> q.shape, s.shape, r.shape
    (torch.Size([8, 256]), torch.Size([8, 1]), torch.Size([8, 256]))

    Source: the two ops that it is composed of.

    Args:
        x: ``[T, ..., H]``, floating point.
        x_residual: ``[T, ..., H]``, floating point.
        weight: ``[H]``, floating point, or None for no scaling.
        epsilon: added to the mean square.

    Returns:
        ``q``: ``[T, ..., H]``, float8_e4m3fn; ``s``: ``[T, ..., 1]``, float32; ``r``: ``[T, ..., H]`` in ``x``'s dtype.

    Raises:
        RuntimeError: the shapes of ``x`` and ``x_residual`` do not match; ``weight`` does not have ``H`` elements.
    """
    y, residual = fused_add_rms_norm(x, x_residual, weight, epsilon)
    q, scale = quant_fp8_per_token(y)
    return q, scale, residual


@register_op
def fused_add_rms_norm_quant_fp8_per_group(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual addition, the normalization, and the quantization of its result per group, between two layers.

    ``y, r = fused_add_rms_norm(x, x_residual, weight, epsilon)`` and ``q, s = quant_fp8_per_group(y)``. Inside a mode
    the two run as one piece of compiled code. The first result is rounded to its dtype in between, as if the two were
    called one after the other.

    >>> x = torch.ones(8, 256)
    >>> q, s, r = dc.ops.fused_add_rms_norm_quant_fp8_per_group(x, x, None, 1e-6)
    >>> q.shape, s.shape, r.shape
    (torch.Size([8, 256]), torch.Size([8, 2]), torch.Size([8, 256]))

    Source: the two ops that it is composed of.

    Args:
        x: ``[T, ..., H]``, floating point, ``H`` divisible by 128.
        x_residual: ``[T, ..., H]``, floating point.
        weight: ``[H]``, floating point, or None for no scaling.
        epsilon: added to the mean square.

    Returns:
        ``q``: ``[T, ..., H]``, float8_e4m3fn; ``s``: ``[T, ..., H / 128]``, float32; ``r``: ``[T, ..., H]`` in ``x``'s
        dtype.

    Raises:
        ValueError: ``H`` is not divisible by 128.
        RuntimeError: the shapes of ``x`` and ``x_residual`` do not match; ``weight`` does not have ``H`` elements.
    """
    y, residual = fused_add_rms_norm(x, x_residual, weight, epsilon)
    q, scale = quant_fp8_per_group(y)
    return q, scale, residual
