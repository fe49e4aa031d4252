"""vLLM's own ``CustomOp`` layers inside opaque ops: in a mode they run compiled, and agree with vLLM's native code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vllm_support import (
    GroupShape,
    OpaqueOps,
    QuantFP8,
    _DecodeConcatQuantFP8,
    assert_agree,
    made,
    silu_and_mul,
)

import dispatch_compile as dc

pytestmark = pytest.mark.vllm

HIDDEN = 256
TOKENS = (1, 2, 7, 64, 300)
LAYERS: dict[str, torch.nn.Module] = {}  # by name: an opaque op cannot be given a layer, and vLLM's look it up as well


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def catching():
    handle = dc.vllm.catch_custom_ops()
    yield
    handle.remove()
    LAYERS.clear()


@pytest.fixture(scope="module")
def opaque():
    ops = OpaqueOps("test_vllm_layers")

    def activate(x: Tensor, layer_name: str) -> Tensor:
        return LAYERS[layer_name](x)

    def quantize(x: Tensor, scale: Tensor | None, layer_name: str) -> tuple[Tensor, Tensor]:
        values, scales = LAYERS[layer_name](x, scale)
        return values, scales.clone() if scales is scale else scales  # an opaque op may not return what it was given

    def concat_and_quantize(nope: Tensor, pe: Tensor, scale: Tensor, layer_name: str) -> Tensor:
        return LAYERS[layer_name](nope, pe, scale)

    for body in (activate, quantize, concat_and_quantize):
        ops.register(body)
    yield torch.ops.test_vllm_layers
    ops.remove()


def random(*size: int) -> Tensor:
    return (torch.randn(*size, generator=torch.Generator().manual_seed(size[0])) * 8).to(torch.bfloat16)


with torch.inference_mode():
    SCALE = torch.tensor([0.02])


def rows(tokens: int) -> tuple[Tensor]:
    return (random(tokens, HIDDEN),)


def rows_and_scale(tokens: int) -> tuple[Tensor, Tensor]:
    return random(tokens, HIDDEN), SCALE


def rows_alone(tokens: int) -> tuple[Tensor, None]:
    return random(tokens, HIDDEN), None


def ragged_rows(tokens: int) -> tuple[Tensor, None]:
    return random(tokens, 200), None


def queries(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    heads_first = random(4, tokens, 64).transpose(0, 1)  # as the batched matrix multiplication before it leaves it
    return heads_first, random(tokens, 4, 32), SCALE


PER_GROUP = GroupShape(1, 128)
# Name: how the layer is made, the opaque op that calls it, its arguments, and how many specializations TOKENS need:
# one for one token, one for all others; with padding, one more where there are more tokens than it pads to.
CASES = {
    "SiluAndMul": (silu_and_mul, "activate", rows, 2),
    "static per tensor": (lambda: QuantFP8(True, GroupShape.PER_TENSOR), "quantize", rows_and_scale, 2),
    "dynamic per tensor": (lambda: QuantFP8(False, GroupShape.PER_TENSOR), "quantize", rows_alone, 2),
    "dynamic per token": (lambda: QuantFP8(False, GroupShape.PER_TOKEN), "quantize", rows_alone, 2),
    "padded": (lambda: QuantFP8(False, GroupShape.PER_TENSOR, num_token_padding=17), "quantize", rows_alone, 3),
    "static padded": (
        lambda: QuantFP8(True, GroupShape.PER_TENSOR, num_token_padding=17),
        "quantize",
        rows_and_scale,
        3,
    ),
    "per group of 128": (lambda: QuantFP8(False, PER_GROUP), "quantize", rows_alone, 2),
    "per group, ragged": (lambda: QuantFP8(False, PER_GROUP), "quantize", ragged_rows, 2),
    "column-major scales": (lambda: QuantFP8(False, PER_GROUP, column_major_scales=True), "quantize", rows_alone, 2),
    "power-of-two scales": (lambda: QuantFP8(False, PER_GROUP, use_ue8m0=True), "quantize", rows_alone, 2),
    "MLA decode": (
        lambda: _DecodeConcatQuantFP8(True, GroupShape.PER_TENSOR, compile_native=True),
        "concat_and_quantize",
        queries,
        2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_layer_runs_compiled_in_an_opaque_op_and_agrees_with_vllms_native_code(opaque, case):
    make, opaque_name, arguments, specializations = CASES[case]
    layer = LAYERS["it"] = made(make)
    op = getattr(opaque, opaque_name)
    mode = dc.DispatchCompileMode(trace=True)
    for tokens in TOKENS:
        args = arguments(tokens)
        with mode:
            actual = op(*args, "it")
        assert_agree(actual, layer.forward_native(*args))
    events = mode.trace.events
    assert [(event.action, event.depth) for event in events] == [("compiled", 1)] * len(TOKENS), str(mode.trace)
    assert all(event.op.startswith("vllm_custom_op::") for event in events)
    assert mode.cache.stats().compiles == specializations
    assert mode.cache.stats().hits == len(TOKENS)


@pytest.mark.parametrize("case", ["SiluAndMul", "static per tensor", "dynamic per token", "per group of 128"])
def test_no_tokens(opaque, case):
    make, opaque_name, arguments, _ = CASES[case]
    layer = LAYERS["it"] = made(make)
    args = arguments(0)
    mode = dc.DispatchCompileMode()
    with mode:
        actual = getattr(opaque, opaque_name)(*args, "it")
    assert_agree(actual, layer.forward_native(*args))
    assert mode.cache.stats().hits == 1


def test_static_quantization_returns_the_very_scale_that_it_was_given():
    layer = made(lambda: QuantFP8(True, GroupShape.PER_TENSOR))
    mode = dc.DispatchCompileMode()
    with mode:
        for _ in range(2):
            _, scale = layer(random(4, HIDDEN), SCALE)
            assert scale is SCALE
            _, scale = layer(scale=SCALE, x=random(4, HIDDEN))
            assert scale is SCALE
    assert mode.cache.stats().hits == 4


def test_a_configuration_is_never_mistaken_for_another():
    """All in one mode, so in one cache; the results tell them apart."""
    layers = {
        name: made(make)
        for name, (make, _, arguments, _) in CASES.items()
        if arguments is rows_alone or arguments is rows_and_scale
    }
    mode = dc.DispatchCompileMode(trace=True)
    for tokens in (2, 40):
        for name, layer in layers.items():
            args = CASES[name][2](tokens)
            with mode:
                actual = layer(*args)
            assert_agree(actual, layer.forward_native(*args))
    assert len({event.op for event in mode.trace.events}) == len(layers)


def test_layers_of_one_configuration_share_compiled_code():
    layers = [made(silu_and_mul) for _ in range(4)]
    mode = dc.DispatchCompileMode()
    with mode:
        for layer in layers:
            layer(random(4, HIDDEN))
    assert (mode.cache.stats().compiles, mode.cache.stats().hits, len(mode.cache)) == (1, 4, 1)
