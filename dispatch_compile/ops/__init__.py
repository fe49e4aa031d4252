"""IR ops that ship with the package, each with shapes, formula and source. ``T`` is the number of tokens."""

from .activation import gelu_and_mul, silu_and_mul
from .layernorm import fused_add_rms_norm, rms_norm
from .quantization import concat_quant_fp8, quant_fp8_per_group, quant_fp8_per_token, quant_fp8_static

__all__ = [
    "concat_quant_fp8",
    "fused_add_rms_norm",
    "gelu_and_mul",
    "quant_fp8_per_group",
    "quant_fp8_per_token",
    "quant_fp8_static",
    "rms_norm",
    "silu_and_mul",
]
