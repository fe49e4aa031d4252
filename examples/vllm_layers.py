"""Layers of vLLM in the body of an opaque op, as in a fused MoE, where a model's torch.compile does not see them.

To see what becomes of them, without weights and also on a CPU:

    VLLM_TARGET_DEVICE=cpu python -m dispatch_compile trace examples/vllm_layers.py
"""

from __future__ import annotations

import torch
import vllm.ir
from torch import Tensor, nn
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

import dispatch_compile as dc

HIDDEN = 64


class Expert(nn.Module):
    """An RMSNorm, a gated activation behind a matmul, and the quantization in front of the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = SiluAndMul()
        self.quantize = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden], [hidden, 2 * hidden] -> values [tokens, hidden] in fp8, their scales [tokens, 1]."""
        normed = vllm.ir.ops.rms_norm(x, None, 1e-6)
        values, scales = self.quantize(self.activation(normed @ weight))
        return values, scales


dc.vllm.enable()
config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.STOCK_TORCH_COMPILE, custom_ops=["none"]))
with set_current_vllm_config(config):
    expert = Expert()


@torch.library.custom_op("mylib::moe", mutates_args=())
def moe(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return expert(x, weight)


with torch.inference_mode(), vllm.ir.ops.rms_norm.set_priority(["native"]):
    for tokens in (8, 16):
        moe(torch.randn(tokens, HIDDEN, dtype=torch.bfloat16), torch.randn(HIDDEN, 2 * HIDDEN, dtype=torch.bfloat16))
