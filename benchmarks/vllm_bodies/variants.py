"""The ways to run the small ops of a body. Each is to be had in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch._dynamo.utils import counters
from vllm import ir
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.config.kernel import IrOpPriorityConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention.mla_attention import _DecodeConcatQuantFP8
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

from dispatch_compile._ir.protocol import NATIVE
from dispatch_compile.vllm import enable

from .bodies import MlaLayers, MoeLayers
from .results import EAGER, OURS, REST, TODAY

GROUP = GroupShape(1, 128)

# ATen ops that the native code of layers and of norms computes with, and nothing else in the bodies does.
OF_LAYERS = frozenset({"aten::clamp", "aten::silu"})
OF_NORMS = frozenset({"aten::rsqrt"})


class Variant(Protocol):
    """A way to run the small ops.

    Attributes:
        never_eager: the ATen ops that must not run.
    """

    never_eager: frozenset[str]

    def layers(self, body: str) -> MoeLayers | MlaLayers:
        """New ones for a body."""

    def compilations(self) -> int | None:
        """How many there were up to now; None if it does not compile."""


class _Vllms:
    """vLLM's layers under one of its compilation modes, its own kernels off, as they are when it compiles."""

    def __init__(self, mode: CompilationMode) -> None:
        self._config = VllmConfig(compilation_config=CompilationConfig(mode=mode, custom_ops=["none"]))
        IrOpPriorityConfig.with_default([NATIVE]).set_default()  # as vLLM has it where Inductor compiles

    def layers(self, body: str) -> MoeLayers | MlaLayers:
        with set_current_vllm_config(self._config):
            if body.startswith("mla"):
                return MlaLayers(
                    ir.ops.rms_norm,
                    _DecodeConcatQuantFP8(True, GroupShape.PER_TENSOR, compile_native=True),
                    QuantFP8(True, GroupShape.PER_TENSOR),
                )
            shape = GROUP if body == "fused_moe_per_group" else GroupShape.PER_TOKEN
            return MoeLayers(QuantFP8(False, shape), SiluAndMul(), QuantFP8(False, shape))


class Eager(_Vllms):
    """What ``enforce_eager`` makes of the layers, without their kernels: native code, op by op."""

    never_eager: frozenset[str] = frozenset()

    def __init__(self) -> None:
        super().__init__(CompilationMode.NONE)

    def compilations(self) -> None:
        return None


class Today(_Vllms):
    """Layers that vLLM compiles by themselves (``CustomOp.maybe_compile``), and IR ops that run eagerly."""

    never_eager = OF_LAYERS

    def __init__(self) -> None:
        super().__init__(CompilationMode.STOCK_TORCH_COMPILE)

    def compilations(self) -> int:
        return int(counters["stats"]["unique_graphs"])


class Ours(_Vllms):
    """The same with ``dispatch_compile.vllm.enable()``."""

    never_eager = OF_LAYERS | OF_NORMS

    def __init__(self) -> None:
        super().__init__(CompilationMode.STOCK_TORCH_COMPILE)
        mode = enable()
        assert mode is not None  # it would be, under a configuration that has compilation off
        self._mode = mode

    def compilations(self) -> int:
        return self._mode.cache.stats().compiles


class Rest(Eager):
    """The body without its small ops: after a first call they return what they returned then.

    The rest of the body works on the same values as ever, since a GPU multiplies zeros faster than other numbers.
    """

    never_eager = OF_LAYERS | OF_NORMS

    def layers(self, body: str) -> MoeLayers | MlaLayers:
        layers = super().layers(body)
        return type(layers)(*map(_remembering, vars(layers).values()))


def _remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that computes once for each shape of its first argument."""
    results: dict[torch.Size, Any] = {}

    def remembered(*args: Any) -> Any:
        shape = args[0].shape
        if shape not in results:
            results[shape] = function(*args)
        return results[shape]

    return remembered


VARIANT_CLASSES: dict[str, Callable[[], Variant]] = {EAGER: Eager, TODAY: Today, OURS: Ours, REST: Rest}
