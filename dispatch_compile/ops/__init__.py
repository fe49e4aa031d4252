"""IR ops that ship with the package, each with shapes, formula and source. ``T`` is the number of tokens."""

from .activation import gelu_and_mul, silu_and_mul
from .fused import (
    fused_add_rms_norm_quant_fp8_per_group,
    fused_add_rms_norm_quant_fp8_per_token,
    rms_norm_quant_fp8_per_group,
    rms_norm_quant_fp8_per_token,
    silu_and_mul_quant_fp8_per_group,
    silu_and_mul_quant_fp8_per_token,
)
from .layernorm import fused_add_rms_norm, rms_norm
from .quantization import concat_quant_fp8, quant_fp8_per_group, quant_fp8_per_token, quant_fp8_static

__all__ = [
    "concat_quant_fp8",
    "fused_add_rms_norm",
    "fused_add_rms_norm_quant_fp8_per_group",
    "fused_add_rms_norm_quant_fp8_per_token",
    "gelu_and_mul",
    "quant_fp8_per_group",
    "quant_fp8_per_token",
    "quant_fp8_static",
    "rms_norm",
    "rms_norm_quant_fp8_per_group",
    "rms_norm_quant_fp8_per_token",
    "silu_and_mul",
    "silu_and_mul_quant_fp8_per_group",
    "silu_and_mul_quant_fp8_per_token",
]
