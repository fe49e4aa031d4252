"""IR ops that ship with the package, for the bodies of your custom ops: normalization, gated activations, quantization.

Call them as functions. Inside a mode they run compiled; elsewhere they run eagerly. Under ``torch.compile`` they stay
one op each. Each docstring has shapes, dtypes, formula and source; ``T`` is the number of tokens.

>>> with torch.inference_mode(), dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager")):
...     q, scale = dc.ops.quant_fp8_per_token(dc.ops.rms_norm(torch.ones(8, 64), torch.ones(64), 1e-6))
>>> q.dtype, q.shape, scale.shape
(torch.float8_e4m3fn, torch.Size([8, 64]), torch.Size([8, 1]))
"""

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
