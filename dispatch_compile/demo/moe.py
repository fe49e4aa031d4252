"""A fused mixture of experts with the shapes of Qwen3-30B-A3B, as one opaque custom op."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody gives it
from torch import Tensor

from .ir_ops import ir_ops
from .workload import NAMESPACE, Setup, Workload, generator, register_opaque_op

HIDDEN = 2048
EXPERTS = 128
TOP_K = 8
INTERMEDIATE = 768


def fused_moe(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, top_k: int, ir: str) -> Tensor:
    """Send each token through the ``top_k`` experts that the router likes best, and add up what they say.

    Args:
        x: ``[T, H]``, floating point.
        router: ``[E, H]``, floating point; products are computed in the weights' dtype.
        gate_up: ``[E, 2 * I, H]``, gate and up projection one above the other.
        down: ``[E, H, I]``.
        top_k: experts per token.
        ir: where the activation and the quantization come from.

    Returns:
        ``[T, H]`` in ``x``'s dtype.
    """
    ops = ir_ops(ir)
    # No IR op in front of the router: where two experts are nearly as good, a last digit would choose between them.
    weights, experts = _route(x, router, top_k)  # both [T, top_k]
    expert_of_row, row_order = experts.flatten().sort(stable=True)
    group_ends = _group_ends(expert_of_row, router.shape[0])

    rows = x[row_order // top_k]  # [T * top_k, H], the rows of an expert side by side
    activated = ops.activation_and_mul(_grouped_matmul(rows, gate_up, group_ends))
    quantized, scale = ops.quant_per_token(activated)
    # The scale is per row, so it may wait until after the product, where vLLM's kernels apply it as well.
    rows = _grouped_matmul(quantized.to(x.dtype), down, group_ends).to(torch.float32) * scale

    of_token = rows[row_order.argsort()].view(*experts.shape, rows.shape[-1])
    return (of_token * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def _route(x: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    probabilities = F.linear(x.to(router.dtype), router).softmax(dim=-1, dtype=torch.float32)
    weights, experts = probabilities.topk(top_k, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), experts


def _group_ends(sorted_experts: Tensor, count: int) -> Tensor:
    """Where each expert's rows end, found without waiting for the device."""
    numbers = torch.arange(count, device=sorted_experts.device)
    return torch.searchsorted(sorted_experts, numbers, right=True).to(torch.int32)


def _grouped_matmul(rows: Tensor, weights: Tensor, group_ends: Tensor) -> Tensor:
    """``[M, K]`` rows, each times the ``[N, K]`` weight of its group: ``[M, N]`` in the rows' dtype."""
    if rows.is_cuda and rows.dtype == torch.bfloat16 and len(rows):
        product: Tensor = F.grouped_mm(rows, weights.transpose(-2, -1), offs=group_ends)
        return product
    product = rows.new_empty(rows.shape[0], weights.shape[1])
    start = 0
    for weight, end in zip(weights, group_ends.tolist(), strict=True):
        if end > start:
            product[start:end] = rows[start:end].to(weight.dtype) @ weight.t()
        start = end
    return product


def _fused_moe_fake(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, top_k: int, ir: str) -> Tensor:
    return torch.empty_like(x)


register_opaque_op(fused_moe, _fused_moe_fake)


def workload(setup: Setup) -> Workload:
    """The op with fixed random weights: every projection keeps the size of its input."""
    random = generator(setup.device, seed=0)

    def weight(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=random, device=setup.device, dtype=setup.matmul_dtype)
        return values.mul_(shape[-1] ** -0.5)

    router = weight(setup.experts, HIDDEN)
    gate_up = weight(setup.experts, 2 * INTERMEDIATE, HIDDEN)
    down = weight(setup.experts, HIDDEN, INTERMEDIATE)
    top_k = min(TOP_K, setup.experts)

    def arguments(tokens: int) -> tuple[Any, ...]:
        random = generator(setup.device, seed=tokens)
        x = torch.randn(tokens, HIDDEN, generator=random, device=setup.device, dtype=setup.dtype)
        return x, router, gate_up, down, top_k, setup.ir

    return Workload(fused_moe.__name__, getattr(torch.ops, NAMESPACE).fused_moe, arguments)
