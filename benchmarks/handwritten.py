"""vLLM's CUDA kernels, called as vLLM calls them, outputs allocated. They are in ``_C_stable_libtorch.abi3.so`` of its
wheel (0.23.0 for torch 2.11)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dispatch_compile.ops.quantization import FP8, FP8_MAX, GROUP


def load(path: str) -> None:
    """Register the kernels as ``torch.ops._C``.

    Raises:
        OSError: no such library, or one made for another torch.
    """
    torch.ops.load_library(path)


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


def _fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, residual, weight, epsilon)
    return x, residual


def _silu_and_mul(x: Tensor) -> Tensor:
    out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype, device=x.device)
    torch.ops._C.silu_and_mul(out, x)
    return out


def _gelu_and_mul(x: Tensor) -> Tensor:
    out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype, device=x.device)
    torch.ops._C.gelu_and_mul(out, x)
    return out


def _quant_fp8_static(x: Tensor, scale: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=FP8, device=x.device)
    torch.ops._C.static_scaled_fp8_quant(out, x, scale, None)
    return out


def _quant_fp8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    torch.ops._C.dynamic_per_token_scaled_fp8_quant(out, x, scale, None)
    return out, scale


def _quant_fp8_per_group(x: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty(x.shape[0], x.shape[1] // GROUP, dtype=torch.float32, device=x.device)
    smallest_maximum = 1e-10
    torch.ops._C.per_token_group_fp8_quant(
        x, out, scale, GROUP, smallest_maximum, -FP8_MAX, FP8_MAX, False, False, False
    )
    return out, scale


def _silu_and_mul_quant_fp8_per_group(x: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=FP8, device=x.device)
    scale = torch.empty(x.shape[0], out.shape[1] // GROUP, dtype=torch.float32, device=x.device)
    torch.ops._C.silu_and_mul_per_block_quant(out, x, scale, GROUP, None, False)
    return out, scale


def _rms_norm_quant_fp8_per_token(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return _norm_per_token(x, None, weight, epsilon)


def _fused_add_rms_norm_quant_fp8_per_token(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (*_norm_per_token(x, residual, weight, epsilon), residual)


def _norm_per_token(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    torch.ops._C.rms_norm_dynamic_per_token_quant(out, x, weight, scale, epsilon, None, residual)
    return out, scale


def _rms_norm_quant_fp8_per_group(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return _norm_per_group(x, None, weight, epsilon)


def _fused_add_rms_norm_quant_fp8_per_group(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (*_norm_per_group(x, residual, weight, epsilon), residual)


def _norm_per_group(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty(x.shape[0], x.shape[1] // GROUP, dtype=torch.float32, device=x.device)
    torch.ops._C.rms_norm_per_block_quant(out, x, weight, scale, epsilon, None, residual, GROUP, False)
    return out, scale


# By op; concat_quant_fp8 and silu_and_mul_quant_fp8_per_token have no kernel that does all of it.
HANDWRITTEN: dict[str, Callable[..., Any]] = {
    "rms_norm": _rms_norm,
    "fused_add_rms_norm": _fused_add_rms_norm,
    "silu_and_mul": _silu_and_mul,
    "gelu_and_mul": _gelu_and_mul,
    "quant_fp8_static": _quant_fp8_static,
    "quant_fp8_per_token": _quant_fp8_per_token,
    "quant_fp8_per_group": _quant_fp8_per_group,
    "silu_and_mul_quant_fp8_per_group": _silu_and_mul_quant_fp8_per_group,
    "rms_norm_quant_fp8_per_token": _rms_norm_quant_fp8_per_token,
    "rms_norm_quant_fp8_per_group": _rms_norm_quant_fp8_per_group,
    "fused_add_rms_norm_quant_fp8_per_token": _fused_add_rms_norm_quant_fp8_per_token,
    "fused_add_rms_norm_quant_fp8_per_group": _fused_add_rms_norm_quant_fp8_per_group,
}
