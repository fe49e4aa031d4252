"""Bodies of opaque ops around vLLM's layers: a fused mixture of experts, and a decode step of multi-head latent
attention, with the sizes of DeepSeek-V3.

What is not the layers' is the same for all variants. One plain matrix product stands in for the experts' grouped
products, and a cast for the attention over the cache, so that what the layers cost is not lost beside them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from vllm.utils.torch_utils import direct_register_custom_op

from .results import Sizes

FP8 = torch.float8_e4m3fn
DTYPE = torch.bfloat16
NAMESPACE = "dispatch_compile_vllm_bodies"

TOP_K = 8
Q_LATENT, LATENT, NOPE, ROPE, VALUE = 1536, 512, 128, 64, 128
EPSILON = 1e-6
QUERY_SCALE = 0.01  # 448 of them are 4.48 standard deviations of the values that are quantized
ROW_SIZE = 100.0  # about the standard deviation of a row after quantization


@dataclass(frozen=True)
class MoeLayers:
    """The small ops of a fused mixture of experts; the quantizations return values and scales."""

    quantize_input: Callable[[Tensor], tuple[Tensor, Tensor]]
    activate: Callable[[Tensor], Tensor]
    quantize_activated: Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MlaLayers:
    """The small ops of a decode step of multi-head latent attention."""

    norm: Callable[[Tensor, Tensor, float], Tensor]
    concat_and_quantize: Callable[[Tensor, Tensor, Tensor], Tensor]
    quantize_output: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


# An opaque op takes no objects. It looks its layers up by name, as vLLM's ops do.
LAYERS: dict[str, Any] = {}


def fused_moe(
    x: Tensor,
    token_of_row: Tensor,
    routing_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    one: Tensor,
    layers: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize, multiply, activate, quantize, multiply, and add up the ``K`` rows of each of ``T`` tokens.

    Args:
        x: ``[T, H]``, bfloat16.
        token_of_row: ``[T * K]``, int64.
        routing_weights: ``[T, K]``, bfloat16.
        gate_up, gate_up_scale: ``[2 * I, H]``, and one element, float32.
        down, down_scale: ``[H, I]``, and one element, float32.
        one: one element, float32.
        layers: the name of the :class:`MoeLayers`.

    Returns:
        ``[T, H]``, bfloat16, and the scales of the two quantizations, which the product that stands in for the experts'
        leaves out.
    """
    its: MoeLayers = LAYERS[layers]
    values, scales = its.quantize_input(x)
    rows = values.view(torch.uint8)[token_of_row].view(FP8)  # not all devices index float8
    activated = its.activate(_product(rows, gate_up, one, gate_up_scale))
    values, row_scales = its.quantize_activated(activated)
    of_rows = _product(values, down, one, down_scale).view(*routing_weights.shape, x.shape[-1])
    return torch.bmm(routing_weights.unsqueeze(1), of_rows).squeeze(1), scales, row_scales


def _product(rows: Tensor, weight: Tensor, one: Tensor, scale: Tensor) -> Tensor:
    """``[M, K]`` float8 times ``[N, K]``: ``[M, N]``, bfloat16."""
    if rows.is_cuda:
        product: Tensor = torch._scaled_mm(rows, weight.t(), scale_a=one, scale_b=scale, out_dtype=DTYPE)
        return product
    return (rows.to(DTYPE) @ weight.t()) * scale.to(DTYPE)


def mla_decode(q: Tensor, k_up: Tensor, v_up: Tensor, scale: Tensor, layers: str) -> Tensor:
    """What vLLM's op does for decoding: absorb, quantize, attend, project, quantize.

    Args:
        q: ``[T, N, NOPE + ROPE]``, bfloat16.
        k_up: ``[N, NOPE, LATENT]``.
        v_up: ``[N, LATENT, VALUE]``.
        scale: one element, float32, of both quantizations.
        layers: the name of the :class:`MlaLayers`.

    Returns:
        ``[T, N * VALUE]``, float8.
    """
    return _attend(q, k_up, v_up, scale, LAYERS[layers])


def mla_decode_with_norms(
    q: Tensor,
    kv: Tensor,
    q_norm: Tensor,
    kv_norm: Tensor,
    q_up: Tensor,
    k_up: Tensor,
    v_up: Tensor,
    scale: Tensor,
    layers: str,
) -> tuple[Tensor, Tensor]:
    """The same with what is in front of it: the norms of the latent query and keys, and the query's projection.

    Args:
        q: ``[T, Q_LATENT]``, bfloat16.
        kv: ``[T, LATENT]``, bfloat16.
        q_norm, kv_norm: weights, ``[Q_LATENT]`` and ``[LATENT]``.
        q_up: ``[Q_LATENT, N * (NOPE + ROPE)]``.
        k_up, v_up, scale, layers: as for :func:`mla_decode`.

    Returns:
        The same, and the normed ``kv``.
    """
    its: MlaLayers = LAYERS[layers]
    projected = its.norm(q, q_norm, EPSILON) @ q_up
    kv = its.norm(kv, kv_norm, EPSILON)
    return _attend(projected.view(len(q), -1, NOPE + ROPE), k_up, v_up, scale, its), kv


def _attend(q: Tensor, k_up: Tensor, v_up: Tensor, scale: Tensor, its: MlaLayers) -> Tensor:
    tokens, heads, _ = q.shape
    nope, rope = q.split([NOPE, ROPE], dim=-1)
    latent = torch.bmm(nope.transpose(0, 1), k_up).transpose(0, 1)
    query = its.concat_and_quantize(latent, rope, scale)
    attended = query[..., :LATENT].to(q.dtype)  # stands in for the attention
    output = torch.empty(tokens, heads, VALUE, dtype=q.dtype, device=q.device)
    torch.bmm(attended.transpose(0, 1), v_up, out=output.transpose(0, 1))
    return its.quantize_output(output.view(tokens, -1), scale)[0]


BODIES: dict[str, Callable[..., Any]] = {
    "fused_moe_per_token": fused_moe,
    "fused_moe_per_group": fused_moe,
    "mla_decode": mla_decode,
    "mla_decode_with_norms": mla_decode_with_norms,
}


@functools.cache
def opaque_op(body: str) -> Callable[..., Any]:
    """The body as an opaque op, registered as vLLM registers its own."""
    direct_register_custom_op(body, BODIES[body], target_lib=_library())
    op: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), body)
    return op


@functools.cache
def _library() -> Library:
    return Library(NAMESPACE, "FRAGMENT")


class Inputs:
    """Random arguments of a body, but for its last one; the weights are made once."""

    def __init__(self, body: str, sizes: Sizes, device: str) -> None:
        self._sizes = sizes
        self._device = device
        self._is_moe = BODIES[body] is fused_moe
        self._has_norms = BODIES[body] is mla_decode_with_norms
        self._weights = self._moe_weights() if self._is_moe else self._mla_weights()

    def of(self, tokens: int) -> tuple[Tensor, ...]:
        """The arguments for that many tokens, the same ones each time."""
        random = self._random(seed=tokens)
        if self._is_moe:
            routing = self._normal(random, tokens, TOP_K).softmax(dim=-1)
            token_of_row = torch.arange(tokens * TOP_K, device=self._device)
            order = torch.randperm(len(token_of_row), generator=random, device=self._device)
            x = self._normal(random, tokens, self._sizes.hidden)
            return x, token_of_row[order] // TOP_K, routing, *self._weights
        if self._has_norms:
            return self._normal(random, tokens, Q_LATENT), self._normal(random, tokens, LATENT), *self._weights
        return self._normal(random, tokens, self._sizes.heads, NOPE + ROPE), *self._weights

    def _moe_weights(self) -> tuple[Tensor, ...]:
        random = self._random(seed=0)
        hidden, intermediate = self._sizes.hidden, self._sizes.intermediate
        dtype = FP8 if self._device == "cuda" else DTYPE
        gate_up = self._normal(random, 2 * intermediate, hidden).to(dtype)
        down = self._normal(random, hidden, intermediate).to(dtype)
        of_gate_up, of_down = (self._one_element(1 / (ROW_SIZE * size**0.5)) for size in (hidden, intermediate))
        return gate_up, of_gate_up, down, of_down, self._one_element(1.0)

    def _mla_weights(self) -> tuple[Tensor, ...]:
        random = self._random(seed=0)
        heads = self._sizes.heads
        k_up = self._normal(random, heads, NOPE, LATENT) * NOPE**-0.5
        v_up = self._normal(random, heads, LATENT, VALUE) * LATENT**-0.5 * QUERY_SCALE
        absorbed = k_up, v_up, self._one_element(QUERY_SCALE)
        if not self._has_norms:
            return absorbed
        q_up = self._normal(random, Q_LATENT, heads * (NOPE + ROPE)) * Q_LATENT**-0.5
        norms = (self._normal(random, size).abs() for size in (Q_LATENT, LATENT))
        return *norms, q_up, *absorbed

    def _random(self, seed: int) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(seed)

    def _normal(self, random: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=self._device, dtype=DTYPE)

    def _one_element(self, value: float) -> Tensor:
        return torch.full((1,), value, device=self._device)
