"""What several tests against the real vLLM need: a configuration, opaque ops as vLLM writes them, its tolerances."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_same
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")  # without it vLLM finds no platform

vllm = pytest.importorskip("vllm", reason="needs the real vLLM")

from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.ir.tolerances import DEFAULT_TOLERANCES  # noqa: E402
from vllm.model_executor.custom_op import CustomOp, op_registry  # noqa: E402
from vllm.model_executor.layers.activation import SiluAndMul  # noqa: E402
from vllm.model_executor.layers.attention.mla_attention import _DecodeConcatQuantFP8  # noqa: E402
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape  # noqa: E402
from vllm.utils.torch_utils import direct_register_custom_op  # noqa: E402

__all__ = ["CustomOp", "GroupShape", "QuantFP8", "SiluAndMul", "_DecodeConcatQuantFP8"]


def vllm_config(mode: str = "STOCK_TORCH_COMPILE", custom_ops: str = "none", **settings: Any) -> VllmConfig:
    """A configuration in which vLLM compiles its layers by themselves, unless ``mode`` or ``settings`` say otherwise.

    The platform may change the mode (a CPU's does), but not ``NONE``.
    """
    return VllmConfig(
        compilation_config=CompilationConfig(mode=CompilationMode[mode], custom_ops=[custom_ops], **settings)
    )


def made(make: Callable[[], Any], config: VllmConfig | None = None) -> Any:
    """What ``make`` makes under a vLLM configuration, as vLLM makes its models."""
    with set_current_vllm_config(config or vllm_config()):
        return make()


def silu_and_mul() -> SiluAndMul:
    """The layer as vLLM has it on a GPU; on a CPU, vLLM 0.23.0 takes back what it compiled."""
    layer = SiluAndMul()
    layer._forward_method = layer.dispatch_forward(compile_native=True)
    return layer


def registered(name: str, **options: Any) -> Callable[[type], type]:
    """``CustomOp.register``, for a name that an earlier test may have taken."""
    op_registry.pop(name, None)
    return CustomOp.register(name, **options)


class OpaqueOps:
    """Custom ops of one library, registered as vLLM registers its own; gone with :meth:`remove`."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self._library = torch.library.Library(namespace, "FRAGMENT")

    def register(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """The opaque op of a function with type hints."""
        direct_register_custom_op(body.__name__, body, target_lib=self._library)
        op: Callable[..., Any] = getattr(getattr(torch.ops, self.namespace), body.__name__)
        return op

    def remove(self) -> None:
        self._library._destroy()


def assert_agree(actual: Any, expected: Any) -> None:
    """Equal in all that a caller sees, the values within vLLM's tolerance for their dtype."""
    if isinstance(expected, tuple):
        assert type(actual) is tuple
        for one, other in zip(actual, expected, strict=True):
            assert_agree(one, other)
    else:
        assert strides_that_matter(actual) == strides_that_matter(expected)
        assert_same(packed(actual), packed(expected), **DEFAULT_TOLERANCES[expected.dtype])


def strides_that_matter(tensor: Tensor) -> list[int]:
    """The strides of the dimensions with more than one element."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def packed(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
