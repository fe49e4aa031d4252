"""Quantization to 8-bit floating point, ``float8_e4m3fn`` (Micikevicius et al., "FP8 Formats for Deep Learning", 2022).

A scale ``s`` is in the unit of the data: ``x ≈ q * s``. Dynamic scales map the largest magnitude to 448, the largest
value of the format, and are at least ``1 / (448 * 512)``, so that a row of zeros has a scale to divide by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ir.embedded import register_op

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
MIN_SCALE = 1.0 / (FP8_MAX * 512.0)
GROUP = 128


@register_op
def quant_fp8_static(x: Tensor, scale: Tensor) -> Tensor:
    """Quantize with one scale that is known beforehand, from calibration.

    ``q = fp8(clamp(x * (1 / scale), -448, 448))``

    >>> dc.ops.quant_fp8_static(torch.tensor([[1.0, 300.0, 1000.0]]), torch.tensor(2.0)).float()
    tensor([[  0.5000, 144.0000, 448.0000]])

    Source: the format is that of Micikevicius et al., "FP8 Formats for Deep Learning", 2022.

    Args:
        x: ``[T, ...]``, floating point.
        scale: one element, float32.

    Returns:
        ``[T, ...]``, float8_e4m3fn.

    Raises:
        RuntimeError: ``scale`` has several elements, and does not broadcast with ``x``.
    """
    return _quantized(x.to(torch.float32), scale)


@register_op
def quant_fp8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row with a scale of its own, in front of a matrix product in 8 bits.

    ``s = max(|row|) / 448``, but at least ``1 / (448 * 512)``, and ``q = fp8(x * (1 / s))``; so ``x ≈ q * s``.

    >>> q, s = dc.ops.quant_fp8_per_token(torch.tensor([[224.0, -448.0, 896.0]]))
    >>> q.float(), s
    (tensor([[ 112., -224.,  448.]]), tensor([[2.]]))

    Source: the format is that of Micikevicius et al., "FP8 Formats for Deep Learning", 2022.

    Args:
        x: ``[T, ..., H]``, floating point.

    Returns:
        ``q``: ``[T, ..., H]``, float8_e4m3fn; ``s``: ``[T, ..., 1]``, float32.

    Raises:
        IndexError: ``H`` is 0.
    """
    values = x.to(torch.float32)
    scale = _scale(values)
    return _quantized(values, scale), scale


@register_op
def quant_fp8_per_group(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each group of 128 neighbours in a row with a scale of its own, as DeepSeek-V3 does with activations.

    For each group ``s = max(|group|) / 448``, but at least ``1 / (448 * 512)``, and ``q = fp8(group * (1 / s))``.

    >>> q, s = dc.ops.quant_fp8_per_group(torch.ones(8, 256))
    >>> q.shape, s.shape
    (torch.Size([8, 256]), torch.Size([8, 2]))
    >>> dc.ops.quant_fp8_per_group(torch.ones(8, 100))
    Traceback (most recent call last):
    ValueError: quant_fp8_per_group: the last dimension of x must be divisible by 128, but x is (8, 100)

    Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 3.3.2.

    Args:
        x: ``[T, ..., H]``, floating point, ``H`` divisible by 128.

    Returns:
        ``q``: ``[T, ..., H]``, float8_e4m3fn; ``s``: ``[T, ..., H / 128]``, float32.

    Raises:
        ValueError: ``H`` is not divisible by 128.
    """
    if x.shape[-1] % GROUP:
        raise ValueError(
            f"quant_fp8_per_group: the last dimension of x must be divisible by {GROUP}, but x is {tuple(x.shape)}"
        )
    values = x.to(torch.float32).unflatten(-1, (-1, GROUP))
    scale = _scale(values)
    return _quantized(values, scale).flatten(-2), scale.squeeze(-1)


@register_op
def concat_quant_fp8(x_latent: Tensor, x_rope: Tensor, scale: Tensor) -> Tensor:
    """The query of an MLA decode step: the latent and the rotary part side by side, quantized with one scale.

    ``q = quant_fp8_static(cat(x_latent, x_rope), scale)``

    >>> q = dc.ops.concat_quant_fp8(torch.ones(2, 128, 512), torch.ones(2, 128, 64), torch.tensor(1.0))
    >>> q.shape, q.dtype
    (torch.Size([2, 128, 576]), torch.float8_e4m3fn)

    Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1, for the two parts; vLLM's ``_DecodeConcatQuantFP8`` for the
        op.

    Args:
        x_latent: ``[T, heads, L]``, floating point (DeepSeek-V3: 128 heads, L = 512).
        x_rope: ``[T, heads, R]``, the same dtype (DeepSeek-V3: R = 64).
        scale: one element, float32.

    Returns:
        ``[T, heads, L + R]``, float8_e4m3fn.

    Raises:
        RuntimeError: the shapes do not match; ``scale`` has several elements, and does not broadcast.
    """
    return _quantized(torch.cat((x_latent, x_rope), dim=-1).to(torch.float32), scale)


def _scale(values: Tensor) -> Tensor:
    return (values.abs().amax(dim=-1, keepdim=True) / FP8_MAX).clamp(min=MIN_SCALE)


def _quantized(values: Tensor, scale: Tensor) -> Tensor:
    # One reciprocal a scale instead of one division an element; the clamp takes what rounding carries past the maximum.
    return (values * scale.reciprocal()).clamp(-FP8_MAX, FP8_MAX).to(FP8)
