"""A decode step of multi-head latent attention with the shapes of DeepSeek-V3, as one opaque custom op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import concat_quant_fp8
from .ir_ops import ir_ops
from .workload import NAMESPACE, Setup, Workload, generator, register_opaque_op

HEADS = 128
LATENT = 512
ROPE = 64
QUERY = 192  # size of a head's query before its latent form, which sets the scale of the scores
EPSILON = 1e-6
CONTEXT = 64  # tokens in each sequence's cache, the new one included


def mla_decode(
    query_latent: Tensor,
    query_rope: Tensor,
    query_scale: Tensor,
    kv_latent: Tensor,
    kv_rope: Tensor,
    kv_norm_weight: Tensor,
    kv_cache: Tensor,
    ir: str,
) -> Tensor:
    """Put each sequence's new token in the cache, and attend to all that is there.

    Args:
        query_latent: ``[T, heads, L]``, floating point, one token for each of ``T`` sequences.
        query_rope: ``[T, heads, R]`` in the same dtype, like the new token's keys and values.
        query_scale: one element, float32.
        kv_latent: ``[T, L]``, not yet normalized.
        kv_rope: ``[T, R]``.
        kv_norm_weight: ``[L]``.
        kv_cache: ``[T, context, L + R]``, floating point; the last position of each sequence is written.
            Products are computed in its dtype.
        ir: where the norm comes from.

    Returns:
        ``[T, heads, L]`` in the queries' dtype.
    """
    latent = kv_latent.shape[-1]
    kv_cache[:, -1, :latent] = ir_ops(ir).rms_norm(kv_latent, kv_norm_weight, EPSILON)
    kv_cache[:, -1, latent:] = kv_rope

    query = concat_quant_fp8(query_latent, query_rope, query_scale).to(kv_cache.dtype)
    scores = (query @ kv_cache.transpose(1, 2)).to(torch.float32) * (query_scale * QUERY**-0.5)
    output: Tensor = scores.softmax(dim=-1).to(kv_cache.dtype) @ kv_cache[..., :latent]
    return output.to(query_latent.dtype)


def _mla_decode_fake(
    query_latent: Tensor,
    query_rope: Tensor,
    query_scale: Tensor,
    kv_latent: Tensor,
    kv_rope: Tensor,
    kv_norm_weight: Tensor,
    kv_cache: Tensor,
    ir: str,
) -> Tensor:
    return torch.empty_like(query_latent)


register_opaque_op(mla_decode, _mla_decode_fake, mutates_args=["kv_cache"])


def workload(setup: Setup) -> Workload:
    """The op with fixed random inputs of unit size."""

    def arguments(tokens: int) -> tuple[Any, ...]:
        random = generator(setup.device, seed=tokens)

        def normal(*shape: int, dtype: torch.dtype = setup.dtype) -> Tensor:
            return torch.randn(shape, generator=random, device=setup.device, dtype=dtype)

        return (
            normal(tokens, HEADS, LATENT),
            normal(tokens, HEADS, ROPE),
            torch.full((1,), 0.01, device=setup.device),  # 448 of them are 4.48 standard deviations
            normal(tokens, LATENT),
            normal(tokens, ROPE),
            normal(LATENT).abs_(),
            normal(tokens, CONTEXT, LATENT + ROPE, dtype=setup.matmul_dtype),
            setup.ir,
        )

    return Workload(mla_decode.__name__, getattr(torch.ops, NAMESPACE).mla_decode, arguments)
